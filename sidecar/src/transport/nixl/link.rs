//! Links to a receiver and sends writes to the engine thread.

use std::sync::Arc;

use futures::future::BoxFuture;
use protocol::LeaseId;
use protocol::sender::Piece;

use super::command::{Command, Connection};
use super::{KIND, Shared};
use crate::transport::{Kind, Link, LinkError, Outcome, Ready, Remote};

/// A peer that the engine thread is connected to. When the link is dropped, the thread disconnects.
#[derive(Debug)]
pub(super) struct NixlLink(Connection);

/// Connects to a receiver and returns the link.
///
/// # Cancel safety
/// If the future is dropped early, the connection is closed again.
pub(super) async fn connect(
    shared: Arc<Shared>,
    remote: Remote,
) -> Result<Arc<dyn Link>, LinkError> {
    let peer = remote.name.clone();
    let refused = |cause| LinkError {
        kind: KIND,
        peer,
        cause,
    };
    let made = shared.ask(|reply, permit| Command::Link {
        remote: Box::new(remote),
        reply,
        _permit: permit,
    });
    match tokio::time::timeout(shared.link, made).await {
        // The answer owns the connection. If no caller receives the answer, it is dropped, which disconnects
        // the peer.
        Ok(Some(Ok(made))) => Ok(Arc::new(NixlLink(made)) as Arc<dyn Link>),
        Ok(Some(Err(cause))) => Err(refused(cause)),
        Ok(None) => Err(refused(STOPPED.to_owned())),
        Err(_) => Err(refused(format!(
            "the nixl thread was busy for {:?}",
            shared.link
        ))),
    }
}

impl Link for NixlLink {
    fn kind(&self) -> Kind {
        KIND
    }

    /// Sends a write to the engine thread.
    ///
    /// # Cancel safety
    /// If the future is dropped while the engine thread's queue is full, nothing is written. If the future is
    /// dropped later, the write goes on.
    fn write_when(
        &self,
        ready: Ready,
        _lease: LeaseId,
        pieces: Vec<Piece>,
    ) -> BoxFuture<'static, Outcome> {
        let link = self.0.id;
        let command = move |reply, permit| Command::Write {
            link,
            ready,
            pieces,
            reply,
            permit,
        };
        let stopped = || Outcome::Failed {
            // Normally the thread answers all posted writes before it ends, so a write without an answer was
            // not posted. After a panic of the thread, this is not certain.
            terminal: false,
            error: STOPPED.to_owned(),
        };
        // Usually the queue has room, and the thread begins the write even before the caller awaits the
        // future.
        match Arc::clone(&self.0.shared.permits).try_acquire_owned() {
            Ok(permit) => {
                let answer = self.0.shared.put(command, permit);
                Box::pin(async move {
                    match answer {
                        Some(answer) => answer.await.unwrap_or_else(|_| stopped()),
                        None => stopped(),
                    }
                })
            }
            Err(_) => {
                let shared = Arc::clone(&self.0.shared);
                Box::pin(async move { shared.ask(command).await.unwrap_or_else(stopped) })
            }
        }
    }

    fn granule(&self) -> u64 {
        self.0.granule
    }

    fn reported(&self) -> String {
        self.0.reported.clone()
    }
}

const STOPPED: &str = "the nixl thread has ended";
