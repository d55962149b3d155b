//! Raw bindings of NIXL's C API (`libnixl_capi.so`), loaded at run time.
//!
//! The build does not link NIXL, so one binary runs on machines with and without NIXL.
//! [`Library::load`] looks for the library in the usual places: an explicit path, the wheel of the
//! active Python, the system. If no place has a usable library, the error lists each place and the
//! reason.
//!
//! `make bindings` generates the declarations in `bindings.rs` from `nixl_capi.h`. This is the
//! project's own header, with only the functions that the project calls.

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
