//! (being written)
#![allow(dead_code)]
mod init;
mod port;
mod zmq;
fn main() {}
