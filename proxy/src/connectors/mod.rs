//! How a pair of instances hands KV over, for each kind of connector.

pub(crate) mod first_token_stream;
pub(crate) mod handoff;
pub(crate) mod lmcache;
pub(crate) mod merge;
