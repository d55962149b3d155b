//! The KV hand-over between a prefill and a decode instance: messages, their codec, and the
//! handshake as state machines.
//!
//! Nothing in this crate does IO, reads a clock, spawns a task or is unsafe. The machines
//! ([`sender::Sender`], [`receiver::Receiver`]) take `now` and an event and give actions and a
//! deadline; the sidecar's only protocol state lives in them.

#![forbid(unsafe_code)]

pub mod codec;
pub mod dlist;
pub mod ids;
pub mod keys;
pub mod layout;
pub mod local;
pub mod message;
pub mod metadata;
pub mod reason;
pub mod receiver;
pub mod record;
pub mod registration;
pub mod sender;
mod serdes;
mod slots;

pub use ids::{ChunkIndex, EngineId, Epoch, LeaseId, RequestId, SlotIndex, Time, TransferId};
pub use layout::Layout;
pub use reason::Reason;

/// Version of the `x` extension, of the local socket and of the registration messages.
pub const VERSION: u32 = 1;
