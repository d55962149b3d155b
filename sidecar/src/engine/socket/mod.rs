//! The unix socket between engine workers and this process.
//!
//! A connection begins with `Hello`. The task that owns the protocol machines answers the `Hello` through
//! [`Connection`]. The kernel tells the sidecar which user runs the other process. The sidecar accepts only
//! its own user and root.

mod ask;
mod connection;
mod frame;
mod path;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::EngineId;
use protocol::local::{EngineHello, ToSidecar};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::engine::drain::Drain;

pub(crate) use ask::drain;
pub(crate) use connection::Connection;
pub(crate) use path::{check_directory, make_directory};

/// Maximum number of connections of one socket at the same time: one connection per rank, and a few from
/// tests and tools.
const MAX_CONNECTIONS: usize = 64;
/// Maximum number of messages of all engines that wait for the task that owns the machines. When the queue is
/// full, the sockets are not read, so the engines wait (backpressure).
const QUEUE: usize = 1024;

/// An event of an engine connection.
#[derive(Debug)]
pub(crate) enum FromEngine {
    /// An engine has sent its hello and waits for [`Connection::welcome`] or [`Connection::refuse`].
    Hello(Connection, EngineHello),
    /// An engine has sent another message.
    Message(EngineId, ToSidecar),
    /// A connection has ended after its hello.
    Gone(EngineId),
    /// A connection has sent a frame that is not a message; the connection is closed.
    Malformed,
}

/// The listening socket. Dropping the listener ends the connections and removes the file.
#[derive(Debug)]
pub(crate) struct Listener {
    path: PathBuf,
    stop: CancellationToken,
}

/// A socket that could not be bound.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ListenError {
    /// Another process listens on the socket.
    #[error("{0} is served by another process: give this sidecar another `sidecar.socket`")]
    InUse(PathBuf),
    /// The socket's file or folder cannot be made.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The path as configured.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

impl Listener {
    /// Binds `path` and accepts connections until the listener is dropped. The file of a dead process is
    /// replaced.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub(crate) fn bind(
        path: &Path,
        tasks: &mut JoinSet<()>,
        drain: Drain,
    ) -> Result<(Self, mpsc::Receiver<FromEngine>), ListenError> {
        let listener = path::bind(path)?;
        let (events, receiver) = mpsc::channel(QUEUE);
        let stop = CancellationToken::new();
        tasks.spawn(accept(listener, events, drain, stop.clone()));
        let path = path.to_owned();
        Ok((Self { path, stop }, receiver))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!(path = %self.path.display(), %error, "socket file not removed");
        }
    }
}

async fn accept(
    listener: UnixListener,
    events: mpsc::Sender<FromEngine>,
    drain: Drain,
    stop: CancellationToken,
) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // If the process has no free file descriptor, the listener stays readable. The pause keeps
                // the loop from using a whole core.
                warn!(%error, "cannot accept an engine connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(refusal) = path::authorised(&stream) {
            warn!(%refusal, "engine connection refused");
            continue;
        }
        let Ok(permit) = Arc::clone(&permits).try_acquire_owned() else {
            warn!(
                limit = MAX_CONNECTIONS,
                "engine connection refused: too many connections are open"
            );
            continue;
        };
        let id = EngineId(NEXT.fetch_add(1, Ordering::Relaxed));
        let (events, drain, stop) = (events.clone(), drain.clone(), stop.clone());
        connections.spawn(async move {
            let _permit = permit;
            tokio::select! {
                biased;
                () = stop.cancelled() => {}
                () = connection::serve(id, stream, events, drain) => {}
            }
        });
    }
}

/// Number of the next connection. The numbers are unique in the process, so that a number in the log
/// identifies one connection.
static NEXT: AtomicU64 = AtomicU64::new(1);
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
