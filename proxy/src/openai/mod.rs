//! OpenAI's requests and answers as bytes and JSON. No module of this folder opens a
//! connection.

pub(crate) mod body;
pub(crate) mod endpoint;
pub(crate) mod error;
pub(crate) mod fallback;
pub(crate) mod headers;
pub(crate) mod keys;
pub(crate) mod model;
pub(crate) mod origin;
pub(crate) mod passed;
pub(crate) mod prompt_hash;
pub(crate) mod request_id;
pub(crate) mod sse;
pub(crate) mod tokenize;
pub(crate) mod usage;
