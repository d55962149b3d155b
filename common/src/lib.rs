//! Code that the sidecar, the proxy, the store and the discovery crate share.
//!
//! Each module has one purpose. Code belongs here only if two of the crates need the same behaviour, or if the library
//! that it uses has to be exchangeable. Decisions of one program stay in that program.

#![forbid(unsafe_code)]

pub mod accept;
pub mod etcd;
pub mod fd_limit;
pub mod host;
pub mod http_get;
pub mod http_server;
pub mod identity;
pub mod kubernetes;
pub mod manual;
pub mod origin;
pub mod socket_owner;
pub mod zmq;
