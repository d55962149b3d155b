//! The command line, and the addresses that the proxy listens at.

pub(crate) mod addresses;
pub(crate) mod announce;
pub(crate) mod cli;
