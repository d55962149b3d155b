//! Defines the requests that the rest of the process sends to the engine thread, and the answers.

use std::sync::Arc;

use protocol::sender::Piece;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shared;
use crate::transport::{Outcome, Ready, Remote};

/// One request to the engine thread.
#[derive(Debug)]
pub(super) enum Command {
    Divide {
        slots: u32,
        slot_bytes: u64,
    },
    Link {
        remote: Box<Remote>,
        reply: oneshot::Sender<Result<Connection, String>>,
        _permit: OwnedSemaphorePermit,
    },
    Write {
        link: u64,
        ready: Ready,
        pieces: Vec<Piece>,
        reply: oneshot::Sender<Outcome>,
        permit: OwnedSemaphorePermit,
    },
    Unlink(u64),
    /// Wakes the thread because writes are announced.
    Wake,
    Stop,
}

/// The handle of a connected receiver, for code outside the thread. When the handle is dropped, the thread
/// disconnects.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) shared: Arc<Shared>,
    /// The engine thread's number for the receiver.
    pub(super) id: u64,
    pub(super) granule: u64,
    pub(super) reported: String,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.shared.send(Command::Unlink(self.id));
    }
}

/// Answers a caller, which may no longer wait.
pub(super) fn answer(reply: oneshot::Sender<Outcome>, outcome: Outcome) {
    drop(reply.send(outcome));
}

/// Returns the outcome of a write that failed before any part of it was posted.
pub(super) fn unsent(error: impl Into<String>) -> Outcome {
    Outcome::Failed {
        terminal: true,
        error: error.into(),
    }
}
