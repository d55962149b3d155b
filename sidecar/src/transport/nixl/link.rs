//! The sending half of the trait: what is left of it on the runtime's side.

use std::sync::Arc;

use futures::future::BoxFuture;
use protocol::LeaseId;
use protocol::sender::Piece;

use super::Shared;
use super::command::{Command, Connection};
use crate::transport::{Kind, Link, LinkError, Outcome, Ready, Remote};

/// A peer that the engine thread is connected to. Dropping it disconnects.
#[derive(Debug)]
pub(super) struct NixlLink(Connection);

/// # Cancel safety
/// Dropped early, the connection is given up again.
pub(super) async fn connect(
    shared: Arc<Shared>,
    remote: Remote,
) -> Result<Arc<dyn Link>, LinkError> {
    let peer = remote.name.clone();
    let refused = |cause| LinkError {
        kind: Kind::Nixl,
        peer,
        cause,
    };
    let made = shared.ask(|reply, permit| Command::Link {
        remote: Box::new(remote),
        reply,
        _permit: permit,
    });
    match tokio::time::timeout(shared.link, made).await {
        // The connection travels in the answer: an answer that nobody takes drops it, which disconnects.
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
        Kind::Nixl
    }

    /// # Cancel safety
    /// Dropped while the engine thread has no room for it, nothing is written. Otherwise the write goes on.
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
            // The thread answers all it has posted before it ends, so this was not posted;
            // unless it panicked, and then nothing is known.
            terminal: false,
            error: STOPPED.to_owned(),
        };
        // There is room but for a flood of writes: then the thread begins before anybody awaits it.
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
