//! The sidecar beside a vLLM instance.

mod engines;
mod host;
mod local;
mod memory;
mod node;
mod port;
mod receiver;
mod sender;
mod side;
mod trace;
mod transport;
mod wires;
mod zmq;
fn main() {}
