//! A safe, single-threaded layer over NIXL's C API.
//!
//! An [`Agent`] and all objects made from it stay on the thread that made them: none of the types is `Send`. So the
//! agent does not need the library's locks. The agent also does not need the library's own thread, which would use a
//! whole core even when idle. Data moves only while the owner of the agent calls [`Agent::progress`] or
//! [`Transfer::poll`].
//!
//! # Ownership
//!
//! ```text
//! Transfer ─┬─▶ Local ──▶ Registration ─┬─▶ Pinned memory
//!           │                           │
//!           └─▶ Remote list ─▶ Remote ──┴─▶ Agent ─▶ Library (never unloaded)
//! ```
//!
//! Each arrow is a counted reference, so Rust drops the values in the right order: a request before its lists, a list
//! before its remote or its registration, and the remotes and registrations before the agent. Memory is deregistered
//! and dropped only when no list refers to it.
//!
//! If a [`Transfer`] is dropped while it runs, it is leaked together with its lists and its memory.
//! The reason: NIXL would report a successful release although the hardware may still read the
//! memory.

mod agent;
mod error;
mod handle;
mod inner;
mod list;
mod memory;
mod metadata;
mod process_end;
mod remote;
mod transfer;

pub use agent::{Agent, Config};
pub use error::Error;
pub use list::{LocalList, RemoteList, Row};
pub use memory::{Memory, Pinned, Registration};
pub use nixl_sys::{Library, LoadError, Search};
pub use process_end::end_process;
pub use remote::Remote;
pub use transfer::{Merge, State, Transfer};
