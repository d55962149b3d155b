//! The listening side: which clients may connect, and how many.

use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::accept::{self, Change, Limits};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::cache::Cache;
use crate::metrics::{Closed, Metrics};

use super::bounds::Bounds;
use super::connection::{End, Shared, UNIT_BYTES, serve};
use super::shares::{Share, Shares};

/// The port of the `lm://` protocol.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    local: SocketAddr,
    shared: Shared,
    shares: Arc<Shares>,
}

impl Server {
    /// Binds the port; 0 means any free port.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(
        address: &str,
        cache: Cache,
        bounds: Bounds,
        metrics: Metrics,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        info!(address = %local, "lm:// port bound");
        let units = (bounds.in_flight / UNIT_BYTES).min(Semaphore::MAX_PERMITS);
        let shared = Shared {
            in_flight: Arc::new(Semaphore::new(units)),
            lookups: Arc::new(Semaphore::new(LOOKUPS)),
            remote_lookups: Arc::new(Semaphore::new(LOOKUPS)),
            cache,
            bounds,
            metrics,
        };
        Ok(Self {
            listener,
            local,
            shared,
            shares: Arc::new(Shares::new(units, LOOKUPS)),
        })
    }

    /// Returns the address that was bound.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Serves until `stop` is cancelled. Requests that have begun then have `grace` to end.
    pub async fn run(self, stop: CancellationToken, grace: Duration) {
        let Self {
            listener,
            shared,
            shares,
            ..
        } = self;
        let limits = Limits {
            connections: shared.bounds.connections,
            grace,
        };
        let metrics = shared.metrics.clone();
        let changed = |change| match change {
            Change::Open(number) => {
                let number = i64::try_from(number).unwrap_or(i64::MAX);
                metrics.connections.set(number);
            }
            Change::Evicted => {
                metrics.closed(Closed::TooMany);
            }
        };
        let ending = stop.clone();
        accept::run(listener, limits, stop, changed, move |stream, peer| {
            if !shared.bounds.is_allowed(peer.ip()) {
                shared.note(
                    peer,
                    Closed::NotAllowed,
                    &"the address is in no network of --allow",
                );
                return None;
            }
            let share = shares.of(peer.ip());
            Some(run_one(stream, peer, shared.clone(), share, ending.clone()))
        })
        .await;
    }
}

impl Shared {
    fn note(&self, peer: SocketAddr, reason: Closed, text: &dyn Display) {
        let total = self.metrics.closed(reason);
        // A client can cause any number of these lines.
        if total.is_power_of_two() {
            warn!(%peer, total, "connection closed: {text}");
        }
    }
}

async fn run_one(
    stream: TcpStream,
    peer: SocketAddr,
    shared: Shared,
    share: Arc<Share>,
    stop: CancellationToken,
) {
    // A head of 36 bytes must not wait for the answer of the network.
    if let Err(error) = stream.set_nodelay(true) {
        debug!(%peer, %error, "cannot set TCP_NODELAY");
    }
    let end = serve(stream, &shared, &share, &stop).await;
    let reason = match &end {
        End::Closed => return,
        End::Io(_) => Closed::Lost,
        End::Slow(..) => Closed::Slow,
        End::Head(_) => Closed::Malformed,
    };
    shared.note(peer, reason, &end);
}

/// Look-ups at the same time, on disk and in the remote store. Each may read one value.
const LOOKUPS: usize = 32;
