//! The hand-over of KV between two instances, for each kind of connector.

pub(crate) mod first_token_stream;
pub(crate) mod handoff;
pub(crate) mod lmcache;
pub(crate) mod merge;
