//! Defines the requests that the rest of the process sends to the copying thread.

use std::sync::Arc;

use protocol::sender::Piece;
use tokio::sync::oneshot;

use super::Shared;
use super::peer::Peer;
use crate::transport::{Outcome, Ready, Remote};

/// One request to the thread.
#[derive(Debug)]
pub(super) enum Command {
    Link {
        remote: Box<Remote>,
        slot_bytes: u64,
        reply: oneshot::Sender<Result<Mapping, String>>,
    },
    Write {
        peer: Arc<Peer>,
        ready: Ready,
        pieces: Vec<Piece>,
        reply: oneshot::Sender<Outcome>,
    },
    Unlink(Arc<Peer>),
    Stop,
}

/// The handle of a receiver's mapped buffer, for code outside the thread. When the handle is dropped, the
/// thread unmaps the buffer.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) shared: Arc<Shared>,
    pub(super) peer: Arc<Peer>,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The last reference is dropped on the thread, because unmapping takes time.
        let peer = Arc::clone(&self.peer);
        drop(self.shared.commands.send(Command::Unlink(peer)));
    }
}
