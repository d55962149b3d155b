//! Tests that are the contract of [`common::zmq`]. The tests are one program, so that the linker runs only once.
//!
//! The other side of each connection is a plain TCP socket ([`zmtp`]) or another socket of the module. No test depends
//! on the ZeroMQ library of the module: another library that passes all tests can replace it.

mod exchange;
mod floods;
mod hostile;
mod hostile_servers;
mod identity;
mod keyed;
mod keyed_hostile;
mod members;
mod ports;
mod publishers;
mod silence;
mod support;
mod zmtp;
