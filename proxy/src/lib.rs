//! OpenAI-compatible proxy for disaggregated prefill and decode.
//!
//! [`Proxy::bind`] opens both ports, [`Proxy::run`] serves until it is told to stop and drains.
//! The decisions have no IO: [`route`], [`life`], [`registry`], [`body`].

#![forbid(unsafe_code)]

pub mod api;
pub mod app;
pub mod body;
pub mod callback;
pub mod cli;
pub mod drive;
pub mod error;
pub mod flight;
pub mod headers;
pub mod id;
pub mod inflight;
pub mod instance;
pub mod labels;
pub mod legs;
pub mod life;
pub mod metrics;
pub mod patience;
pub mod proxy;
pub mod record;
pub mod registration;
pub mod registry;
pub mod relay;
pub mod route;
pub mod server;
pub mod usage;
pub mod verdict;
pub mod zmq;

pub use proxy::{BindError, End, Proxy, Stop};
