//! Connections to engines, sidecars and etcd.

pub(crate) mod client;
pub(crate) mod pool;
pub(crate) mod tls;
pub(crate) mod upgrade;
