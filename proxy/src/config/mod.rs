//! The command line, and the addresses at which the proxy listens.

pub(crate) mod addresses;
pub(crate) mod announce;
pub(crate) mod cli;
pub(crate) mod keys;
