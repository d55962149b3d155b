//! OpenAI-compatible proxy for disaggregated prefill and decode.
//!
//! [`Proxy::bind`] opens both ports, [`Proxy::run`] serves until it is told to stop and drains.
//! The decisions have no IO: [`route`], [`life`], [`registry`], [`body`].

#![forbid(unsafe_code)]

pub mod access;
pub mod addresses;
pub mod alone;
pub mod announce;
pub mod api;
pub mod app;
pub mod body;
pub mod callback;
pub mod cli;
pub mod control;
pub mod descriptors;
pub mod drive;
pub mod early;
pub mod endpoint;
pub mod error;
pub mod etcd;
pub mod fit;
pub mod flight;
pub mod handover;
pub mod headers;
pub mod id;
pub mod incoming;
pub mod inflight;
pub mod instance;
pub mod labels;
pub mod legs;
pub mod life;
pub mod links;
pub mod lmcache;
pub mod load;
mod mask;
mod memory;
pub mod metrics;
pub mod mode;
pub mod origin;
pub mod otlp;
pub mod outcome;
pub mod p2p;
pub mod patience;
pub mod plan;
pub mod policy;
pub mod prefill;
pub mod prompt;
pub mod proxy;
pub mod record;
pub mod refusals;
pub mod registration;
pub mod registry;
pub mod relay;
pub mod route;
pub mod seats;
pub mod server;
pub mod shared;
pub mod sources;
pub mod sse;
pub mod stitch;
pub mod summary;
pub mod tls;
pub mod trace;
pub mod uploads;
pub mod url;
pub mod usage;
pub mod verdict;
pub mod zmq;
pub mod zone;

pub use proxy::{BindError, End, Proxy, Stop};
