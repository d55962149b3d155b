//! A loop that accepts connections up to a limit, and ends them at the end.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// The limits of a port.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Number of connections at the same time. If a further connection comes, the oldest connection is closed, so that
    /// a client that opens connections and stays silent cannot lock out other clients.
    pub connections: usize,
    /// Time for the work in progress after `stop`.
    pub grace: Duration,
}

/// A change in the number of connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The number of open connections is now this.
    Open(usize),
    /// The oldest connection is closed because there are too many.
    Evicted,
}

/// Accepts connections until `stop` is cancelled, and serves each in a task of its own. `serve` returns `None` for a
/// peer that may not connect. The futures must end by themselves after `stop`; what is left after the grace time ends
/// at once.
pub async fn run<F, S>(
    listener: TcpListener,
    limits: Limits,
    stop: CancellationToken,
    mut changed: impl FnMut(Change),
    serve: F,
) where
    F: Fn(TcpStream, SocketAddr) -> Option<S>,
    S: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut open: VecDeque<(u64, CancellationToken)> = VecDeque::new();
    for number in 0.. {
        let accepted = loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break None,
                Some(ended) = connections.join_next() => {
                    if let Ok(ended) = ended {
                        open.retain(|(number, _)| *number != ended);
                        changed(Change::Open(open.len()));
                    }
                }
                accepted = accept(&listener) => break Some(accepted),
            }
        };
        let Some((stream, peer)) = accepted else {
            break;
        };
        let Some(serving) = serve(stream, peer) else {
            continue;
        };
        if open.len() >= limits.connections
            && let Some((_, oldest)) = open.pop_front()
        {
            oldest.cancel();
            changed(Change::Evicted);
        }
        let evict = CancellationToken::new();
        open.push_back((number, evict.clone()));
        changed(Change::Open(open.len()));
        connections.spawn(async move {
            tokio::select! {
                biased;
                () = evict.cancelled() => {}
                () = serving => {}
            }
            number
        });
    }
    // New connections are refused from now on; only the work in progress is still completed.
    drop(listener);
    let closed = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(limits.grace, closed).await.is_err() {
        debug!(grace = ?limits.grace, "connections were still open at the end");
    }
    connections.shutdown().await;
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                // If an accept fails, the process usually has no free file descriptor. A connection that ends frees
                // its descriptor, so the loop tries to accept again.
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
