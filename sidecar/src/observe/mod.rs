//! Everything that makes the process visible: status, metrics, admin server, registration, sockets that listen.

pub(crate) mod admin;
pub(crate) mod listening;
pub(crate) mod metrics;
pub(crate) mod observer;
pub(crate) mod proxy_discovery;
pub(crate) mod registration;
pub(crate) mod status;
