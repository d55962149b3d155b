//! Sends the pieces of a protected write.

use std::io;
use std::net::TcpStream;
use std::time::Instant;

use rustix::net::{SendFlags, send};

use super::pieces::piece;
use super::seal::{Seal, Seals, TAG_BYTES};
use crate::memory::{Outlet, PIECE_BYTES};

/// The protection of a connection.
#[derive(Debug)]
pub(super) struct Protected {
    pub(super) seals: Seals,
    /// The encrypted bytes of the present piece with their tag; without encryption only the tag.
    block: Vec<u8>,
    piece: Option<Piece>,
}

/// A piece that is partly sent.
#[derive(Clone, Copy, Debug)]
struct Piece {
    /// Bytes that the outlet sends from the buffer. The block's bytes follow.
    clear: usize,
    /// Bytes of the block.
    block: usize,
    /// Bytes that are sent.
    sent: usize,
}

impl Protected {
    pub(super) fn new(seals: Seals) -> Self {
        let block = match seals.out.encrypts() {
            true => PIECE_BYTES + TAG_BYTES,
            false => TAG_BYTES,
        };
        Self {
            seals,
            block: vec![0; block],
            piece: None,
        }
    }

    /// Sends the piece that begins at `from`, and its tag. Returns its bytes once all of it is sent. After `WouldBlock` the
    /// next call goes on with the same piece. `left` bytes of the part are unsent, and the part is the frame's `last`.
    pub(super) fn send(
        &mut self,
        socket: &TcpStream,
        outlet: &mut Outlet,
        from: u64,
        left: u64,
        last: bool,
        progress: &mut Instant,
    ) -> io::Result<usize> {
        let len = piece(left);
        let mut now = match self.piece {
            Some(piece) => piece,
            None => {
                let (seal, block) = (&mut self.seals.out, &mut self.block[..]);
                outlet.read_by(from, len, |bytes| protect(seal, bytes, block))?
            }
        };
        loop {
            let result = if now.sent < now.clear {
                outlet.send(socket, from + now.sent as u64, now.clear - now.sent)
            } else {
                // A tag must not be sent in a segment of its own, if more bytes follow.
                let more = match last && left == len as u64 {
                    true => SendFlags::empty(),
                    false => SendFlags::MORE,
                };
                let block = &self.block[now.sent - now.clear..now.block];
                send(socket, block, more | SendFlags::NOSIGNAL).map_err(io::Error::from)
            };
            match result {
                Ok(n) => {
                    now.sent += n;
                    *progress = Instant::now();
                }
                Err(error) => {
                    self.piece = Some(now);
                    return Err(error);
                }
            }
            if now.sent == now.clear + now.block {
                self.piece = None;
                return Ok(len);
            }
        }
    }
}

/// Computes the tag of a piece, and encrypts it if the connection does so.
fn protect(seal: &mut Seal, bytes: &[u8], block: &mut [u8]) -> Piece {
    let (clear, used) = match seal.encrypts() {
        true => (0, bytes.len() + TAG_BYTES),
        false => (bytes.len(), TAG_BYTES),
    };
    let block = &mut block[..used];
    match seal.encrypts() {
        true => seal.encrypt(bytes, block),
        false => block.copy_from_slice(&seal.tag(bytes)),
    }
    Piece {
        clear,
        block: used,
        sent: 0,
    }
}
