//! (being written)
mod memory;
mod transport;
fn main() {}
