//! The engines of this sidecar: their unix socket and their sessions.

pub(crate) mod drain;
pub(crate) mod sessions;
pub(crate) mod socket;
