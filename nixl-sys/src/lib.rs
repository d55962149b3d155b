//! Raw bindings of NIXL's C API (`libnixl_capi.so`), loaded at run time.
//!
//! Nothing is linked when this crate is built: one binary runs on machines with and without NIXL.
//! [`Library::load`] looks for the library where people have it (an explicit path, the wheel of the
//! active Python, the system) and says, when it finds none, which places it tried and why each failed.
//!
//! The declarations in `bindings.rs` are generated from `nixl_capi.h`, this project's own header of
//! the functions that it calls; `make bindings` regenerates them.

mod library;
mod search;

#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    missing_debug_implementations,
    missing_docs,
    non_camel_case_types,
    unreachable_pub,
    reason = "generated"
)]
mod bindings;

pub use bindings::*;
pub use library::{Library, LoadError, Tried};
pub use search::Search;
