//! Serves LMCache's senders, which send no messages about their writes. The modules find the owner of each
//! connection, check whether a slot was written, and keep messages that arrive before the engine.

pub(crate) mod canary;
pub(crate) mod peers;
pub(crate) mod pending;
