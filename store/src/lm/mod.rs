//! LMCache's `lm://` protocol: one request at a time on a TCP connection, numbers of four bytes, no ids.

mod bounds;
mod connection;
mod header;
mod lookup;
mod server;
mod shares;

pub use self::bounds::Bounds;
pub use self::header::{Command, REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
pub use self::server::Server;
