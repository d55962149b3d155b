//! Safe, single-threaded layer over NIXL's C API.
//!
//! An [`Agent`] and everything made from it stay on the thread that made them: none of the types is
//! `Send`. That is what lets the agent run without the library's locks and without its own thread,
//! which burns a core when idle. Whoever owns the agent must call [`Agent::progress`] or
//! [`Transfer::poll`] for anything to move.
//!
//! # What keeps what alive
//!
//! ```text
//! Transfer ─┬─▶ Local ──▶ Registration ─┬─▶ Pinned memory
//!           │                           │
//!           └─▶ Remote list ─▶ Remote ──┴─▶ Agent ─▶ Library (never unloaded)
//! ```
//!
//! Each arrow is a counted reference, so drops happen in this order by themselves: a request is
//! released before its lists, a list before the remote or the registration that it points into, and
//! these before the agent. Memory is deregistered, and given up, only when no list of it is left.
//! A [`Transfer`] that is dropped while it runs is leaked together with all of that: releasing it
//! would return success while the hardware may still read the memory.

mod agent;
mod error;
mod list;
mod memory;
mod metadata;
mod remote;
mod transfer;

pub use agent::{Agent, Config};
pub use error::Error;
pub use list::{LocalList, RemoteList, Row};
pub use memory::{Memory, Pinned, Registration};
pub use nixl_sys::{Library, LoadError, Search};
pub use remote::Remote;
pub use transfer::{Merge, State, Transfer};
