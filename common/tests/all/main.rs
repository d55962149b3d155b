//! The contract of [`common::zmq`], in one program, so that it is linked only once.
//!
//! The other side of each connection is a plain TCP socket ([`zmtp`]) or another socket of the module. No test names the
//! library below the module: a library that passes all of them can replace it.

mod exchange;
mod floods;
mod hostile;
mod hostile_servers;
mod silence;
mod support;
mod zmtp;
