//! A store for KV. Values lie in memory and, if a folder is given, on disk below it. A distributed store of other programs
//! may lie below both.
//!
//! Engines with LMCache use it with `remote_url: "lm://HOST:PORT"`. The modules, from the lowest: [`entry`] is a value,
//! [`remote`] is the distributed store, [`cache`] keeps the values, [`lm`] is LMCache's protocol, [`metrics`] counts, and
//! [`daemon`] runs everything.

pub mod cache;
pub mod daemon;
pub mod entry;
pub mod lm;
pub mod metrics;
pub mod remote;
