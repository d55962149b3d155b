//! The identity of this host, and the counter of frames that are not valid messages.

pub(crate) mod host_id;
pub(crate) mod malformed;
