//! KV transfer between a prefill and a decode instance: messages, codec and the handshake as state
//! machines.
//!
//! This crate does no IO, reads no clock, spawns no task and has no unsafe code. The state machines
//! ([`sender::Sender`], [`receiver::Receiver`]) take `now` and an event, and return actions and a
//! deadline. The state machines hold all protocol state of the sidecar.

#![forbid(unsafe_code)]

pub mod codec;
pub mod dlist;
pub mod example;
pub mod groups;
pub mod ids;
pub mod keep;
pub mod keys;
pub mod layout;
pub mod local;
pub mod message;
pub mod metadata;
pub mod plan;
pub mod reason;
pub mod receiver;
pub mod record;
pub mod registration;
pub mod sender;
mod serdes;
mod slots;

pub use ids::{
    ChunkIndex, EngineId, Epoch, LeaseId, RequestId, SlotIndex, Time, Token, TransferId,
};
pub use layout::Layout;
pub use reason::Reason;

/// Version of the `x` extension, of the local socket and of the registration messages.
pub const VERSION: u32 = 1;
