//! Serves LMCache's senders, which tell a receiver nothing: the owner of each connection, the check whether a slot
//! was written, and the messages that come before the engine.

pub(crate) mod canary;
pub(crate) mod peers;
pub(crate) mod pending;
