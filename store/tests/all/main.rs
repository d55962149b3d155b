//! Tests of the store over its `lm://` port, with a client that writes the bytes itself.

#![allow(missing_docs, missing_debug_implementations, reason = "tests")]

mod bounds;
mod client;
mod disk;
mod requests;
