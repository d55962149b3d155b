//! The instances: what each one is, what it is busy with, and which registrations are alive.

pub(crate) mod base_url;
pub(crate) mod instance;
pub(crate) mod kv_fit;
pub(crate) mod load;
pub(crate) mod p2p_nccl;
pub(crate) mod registry;
pub(crate) mod sources;
pub(crate) mod zmq;
pub(crate) mod zone;
