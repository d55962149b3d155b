//! (being written)
#![allow(dead_code)]
mod port;
mod zmq;
fn main() {}
