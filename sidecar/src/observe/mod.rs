//! All modules that show the state of the process: status, metrics, admin server, registration, listening
//! sockets.

pub(crate) mod admin;
pub(crate) mod listening;
pub(crate) mod metrics;
pub(crate) mod observer;
pub(crate) mod proxy_discovery;
pub(crate) mod registration;
pub(crate) mod status;
