//! The tasks that let sidecars and instances come and go.

pub(crate) mod callback;
pub(crate) mod registration;
pub(crate) mod shared_registry;
