//! Other sidecars: the handshake that introduces two of them, and the lock that proves the end of a process.

pub(crate) mod handshake;
pub(crate) mod process_lock;
