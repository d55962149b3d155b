//! The tasks that add and remove instances.

pub(crate) mod callback;
pub(crate) mod kv_events;
pub(crate) mod ports;
pub(crate) mod registration;
pub(crate) mod shared_registry;
