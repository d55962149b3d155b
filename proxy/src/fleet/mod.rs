//! The instances: their addresses, their load and the leases of their registrations.

pub(crate) mod base_url;
pub(crate) mod instance;
pub(crate) mod kv_events;
pub(crate) mod kv_fit;
pub(crate) mod load;
pub(crate) mod models;
pub(crate) mod p2p_nccl;
pub(crate) mod registry;
pub(crate) mod sources;
pub(crate) mod zone;
