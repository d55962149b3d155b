//! Reads the hello of a new connection, without a thread and with a deadline.

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use super::frame::{Hello, Refusal};

/// A connection that has not sent its whole hello yet.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) socket: TcpStream,
    pub(super) peer: SocketAddr,
    pub(super) hello: [u8; Hello::BYTES],
    pub(super) got: usize,
    pub(super) until: Instant,
}

impl Waiting {
    /// Reads the bytes that have come. Returns the hello once it is complete. An error without a reason means
    /// that the socket failed, or that the peer left before it sent anything.
    pub(super) fn read(&mut self) -> Result<Option<Hello>, Option<Refusal>> {
        match self.socket.read(&mut self.hello[self.got..]) {
            Ok(0) if self.got == 0 => return Err(None),
            Ok(0) => return Err(Some(Refusal::Malformed)),
            Ok(n) => self.got += n,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => return Err(None),
        }
        if !Hello::begins_well(&self.hello[..self.got]) {
            return Err(Some(Refusal::Malformed));
        }
        if self.got < Hello::BYTES {
            return Ok(None);
        }
        let hello = Hello::decode(&self.hello);
        hello.map(Some).ok_or(Some(Refusal::Malformed))
    }
}
