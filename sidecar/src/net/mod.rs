//! ZeroMQ sockets, the owner of a taken port, and the identity of this host.

pub(crate) mod host_id;
pub(crate) mod malformed;
pub(crate) mod socket_owner;
pub(crate) mod zmq;
