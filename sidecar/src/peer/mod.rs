//! Deals with other sidecars: the handshake between two sidecars, and the lock that proves the end of a
//! process.

pub(crate) mod handshake;
pub(crate) mod leftovers;
pub(crate) mod process_lock;
