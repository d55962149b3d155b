//! Runs one rank of a role: its buffer, its protocol machine and its task.

pub(crate) mod context;
pub(crate) mod metrics;
pub(crate) mod node;
pub(crate) mod receiver;
pub(crate) mod recorder;
pub(crate) mod role;
pub(crate) mod sender;
