//! OpenAI-compatible proxy for disaggregated prefill and decode.
//!
//! [`Proxy::bind`] opens both ports. [`Proxy::run`] serves until [`Stop`] is set, and then drains. Only items
//! that the program and its tests use are public. ARCHITECTURE.md lists the responsibility of each folder.
//! The modules that make decisions do no IO: `routing`, `request::state`, `fleet::registry`, `openai::body`.

#![forbid(unsafe_code)]

mod config;
mod connectors;
mod fleet;
mod membership;
mod openai;
mod request;
mod routing;
mod server;
mod state;
mod telemetry;
mod upstream;

pub use common::identity::keygen;
pub use config::cli::{Config, LogFormat};
pub use config::keys::{AuthMode, Command, Keys};
pub use openai::error::Code;
pub use openai::fallback::Fallback;
pub use openai::passed::{Methods, PASSED_ON, PassedOn};
pub use server::fd_limit::raise_limit;
pub use server::{BindError, End, Proxy, Stop};
pub use telemetry::metrics::Metrics;
pub use telemetry::outcome::Outcome;
pub use upstream::tls::TlsFiles;
