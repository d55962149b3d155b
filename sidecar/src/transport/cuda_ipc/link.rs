//! Links to a receiver and sends writes to the copying thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::future::BoxFuture;
use protocol::LeaseId;
use protocol::sender::Piece;
use tokio::sync::oneshot;

use super::command::{Command, Mapping};
use super::{KIND, Shared};
use crate::transport::{Kind, Link, LinkError, Outcome, Ready, Remote};

/// A receiver's mapped buffer. When the link is dropped, the buffer is unmapped once its copies have
/// ended.
#[derive(Debug)]
pub(super) struct CudaLink(Mapping);

/// Maps a receiver's buffer and returns the link.
///
/// # Cancel safety
/// If the future is dropped early, the buffer is unmapped again.
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
    let (reply, answer) = oneshot::channel();
    let command = Command::Link {
        remote: Box::new(remote),
        slot_bytes: shared.slot_bytes.load(Ordering::Acquire),
        reply,
    };
    if shared.commands.send(command).is_err() {
        return Err(refused(STOPPED.to_owned()));
    }
    match tokio::time::timeout(shared.link, answer).await {
        // The answer owns the mapping. If no caller receives the answer, it is dropped, which unmaps the
        // buffer.
        Ok(Ok(Ok(mapping))) => Ok(Arc::new(CudaLink(mapping)) as Arc<dyn Link>),
        Ok(Ok(Err(cause))) => Err(refused(cause)),
        Ok(Err(_)) => Err(refused(STOPPED.to_owned())),
        Err(_) => Err(refused(format!(
            "the receiver's buffer was not mapped within {:?}",
            shared.link
        ))),
    }
}

impl Link for CudaLink {
    fn kind(&self) -> Kind {
        KIND
    }

    fn write_when(
        &self,
        ready: Ready,
        _lease: LeaseId,
        pieces: Vec<Piece>,
    ) -> BoxFuture<'static, Outcome> {
        let (reply, answer) = oneshot::channel();
        let write = Command::Write {
            peer: Arc::clone(&self.0.peer),
            ready,
            pieces,
            reply,
        };
        // The number of the sender machine's requests limits this queue: each request has one write per
        // step of its engine.
        let sent = self.0.shared.commands.send(write).is_ok();
        Box::pin(async move {
            let outcome = if sent { answer.await.ok() } else { None };
            outcome.unwrap_or_else(|| Outcome::Failed {
                // The thread answers all queued writes before it ends, unless it panicked. So a write that
                // was sent may still arrive.
                terminal: !sent,
                error: STOPPED.to_owned(),
            })
        })
    }

    fn reported(&self) -> String {
        self.0.peer.reported.clone()
    }
}

const STOPPED: &str = "the thread that copies between GPUs has ended";
