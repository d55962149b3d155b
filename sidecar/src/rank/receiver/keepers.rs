//! Connects to the fetch ports of prefill sides' sidecars, from which this rank fetches kept KV.
//!
//! The first message to a port makes a connection. The connection ends when it has been idle for a while. The
//! ports come from the requests' parameters, so a client could name any number of ports. Therefore the number
//! of connections has a limit.

use std::collections::BTreeMap;
use std::time::Duration;

use common::zmq::{DealerClient, FromServer, Protection};
use protocol::keep::{ToFetcher, ToKeeper};
use protocol::local::Keeper;
use protocol::{Reason, codec};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// An event from a fetch port.
#[derive(Debug)]
pub(super) enum FromKeeper {
    Message(Keeper, ToFetcher),
    /// No connection can be made, or it has ended.
    Lost(Keeper, Reason),
    /// The peer sent a frame that is not a valid message.
    Malformed,
}

/// The connections of one rank to fetch ports.
#[derive(Debug)]
pub(super) struct Keepers {
    /// The name of this rank's sidecar, for the identities of its sockets.
    name: String,
    /// Maximum time until a connection is made.
    link: Duration,
    protection: Protection,
    connections: BTreeMap<Keeper, Connection>,
    /// The number of the latest connection. Events of older connections to the same port are ignored.
    generation: u64,
    tasks: JoinSet<()>,
    events: mpsc::Sender<(u64, News)>,
    inbox: mpsc::Receiver<(u64, News)>,
}

#[derive(Debug)]
struct Connection {
    generation: u64,
    outbox: mpsc::Sender<Vec<u8>>,
    stop: CancellationToken,
}

#[derive(Debug)]
enum News {
    Message(Keeper, ToFetcher),
    Malformed,
    Lost(Keeper, Reason),
    Idle(Keeper),
}

impl Keepers {
    pub(super) fn new(name: String, link: Duration, protection: Protection) -> Self {
        let (events, inbox) = mpsc::channel(QUEUE);
        Self {
            name,
            link,
            protection,
            connections: BTreeMap::new(),
            generation: 0,
            tasks: JoinSet::new(),
            events,
            inbox,
        }
    }

    /// Queues a message to a fetch port, and connects to the port first if necessary.
    pub(super) fn send(&mut self, to: &Keeper, message: &ToKeeper) {
        if !self.connections.contains_key(to) {
            if self.connections.len() >= MAX_KEEPERS {
                warn!(
                    peer = to.host,
                    port = to.port,
                    "message to a fetch port dropped: {MAX_KEEPERS} connections to such ports are open"
                );
                return;
            }
            self.connect(to.clone());
        }
        if let Some(connection) = self.connections.get(to)
            && connection.outbox.try_send(codec::encode(message)).is_err()
        {
            warn!(
                peer = to.host,
                port = to.port,
                "message to a fetch port dropped: the port does not take messages"
            );
        }
    }

    fn connect(&mut self, to: Keeper) {
        self.generation += 1;
        let generation = self.generation;
        // The prefill side refuses a second connection with the same identity. So no other process may be able
        // to guess the identity and use it first.
        let secret: u64 = rand::random();
        let identity = format!("{}-{secret:016x}-fetch", self.name);
        let (outbox, outgoing) = mpsc::channel(QUEUE);
        let stop = CancellationToken::new();
        let (events, link, stopped) = (self.events.clone(), self.link, stop.clone());
        let (at, protection) = (to.clone(), self.protection.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = run(&at, &identity, &protection, link, outgoing, |news| {
                    let events = events.clone();
                    async move {
                        // The other end of the channel is dropped only when the process ends.
                        let sent = events.send((generation, news)).await;
                        debug_assert!(sent.is_ok() || events.is_closed());
                    }
                }) => {}
            }
        });
        self.connections.insert(
            to,
            Connection {
                generation,
                outbox,
                stop,
            },
        );
    }

    /// Returns the next event of a fetch port. Waits for ever if there is no event.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> FromKeeper {
        loop {
            let (generation, news) = tokio::select! {
                biased;
                Some(received) = self.inbox.recv() => received,
                Some(ended) = self.tasks.join_next() => {
                    if let Err(error) = ended
                        && error.is_panic()
                    {
                        std::panic::resume_unwind(error.into_panic());
                    }
                    continue;
                }
            };
            match news {
                News::Message(from, message) => return FromKeeper::Message(from, message),
                News::Malformed => return FromKeeper::Malformed,
                News::Lost(from, reason) if self.forget(&from, generation) => {
                    return FromKeeper::Lost(from, reason);
                }
                News::Idle(from) => {
                    self.forget(&from, generation);
                }
                News::Lost(..) => {}
            }
        }
    }

    /// Forgets a connection. Returns false if the connection is unknown, for example because a newer connection
    /// to the same port exists.
    fn forget(&mut self, keeper: &Keeper, generation: u64) -> bool {
        let mine = self
            .connections
            .get(keeper)
            .is_some_and(|c| c.generation == generation);
        if mine {
            self.connections.remove(keeper);
        }
        mine
    }

    /// Ends every connection and waits for its task.
    pub(super) async fn close(&mut self) {
        for connection in std::mem::take(&mut self.connections).into_values() {
            connection.stop.cancel();
        }
        self.tasks.shutdown().await;
    }
}

/// Serves one connection until it is lost or idle.
async fn run<F: Future<Output = ()>>(
    to: &Keeper,
    identity: &str,
    protection: &Protection,
    link: Duration,
    mut outgoing: mpsc::Receiver<Vec<u8>>,
    say: impl Fn(News) -> F,
) {
    let Ok(mut dealer) = DealerClient::connect_once(&to.host, to.port, identity, protection).await
    else {
        return say(News::Lost(to.clone(), Reason::NoLink)).await;
    };
    let (late, mut connected) = (Instant::now() + link, false);
    let mut idle = Instant::now() + IDLE;
    loop {
        tokio::select! {
            biased;
            Some(payload) = outgoing.recv() => {
                idle = Instant::now() + IDLE;
                if let Err(error) = dealer.send(payload) {
                    warn!(peer = to.host, port = to.port, %error, "message to a fetch port dropped");
                }
            }
            received = dealer.recv() => match received {
                Ok(FromServer::Connected { .. }) => {
                    connected = true;
                    info!(peer = to.host, port = to.port, "connected to a fetch port");
                }
                Ok(FromServer::Message(bytes)) => match codec::decode(&bytes) {
                    Ok(message) => say(News::Message(to.clone(), message)).await,
                    Err(error) => {
                        warn!(peer = to.host, port = to.port, %error, "malformed message of a fetch port");
                        say(News::Malformed).await;
                    }
                },
                Ok(FromServer::Lost) | Err(_) => {
                    let reason = if connected { Reason::PeerLost } else { Reason::NoLink };
                    warn!(peer = to.host, port = to.port, %reason, "no connection to the fetch port");
                    return say(News::Lost(to.clone(), reason)).await;
                }
            },
            () = sleep_until(late), if !connected => {
                warn!(peer = to.host, port = to.port, ?link, "no connection to the fetch port");
                return say(News::Lost(to.clone(), Reason::NoLink)).await;
            }
            () = sleep_until(idle) => {
                debug!(peer = to.host, port = to.port, "an idle connection to a fetch port ends");
                return say(News::Idle(to.clone())).await;
            }
        }
    }
}

/// If no message is sent to a fetch port for this time, the connection ends. Renewals are more frequent.
const IDLE: Duration = Duration::from_secs(60);
/// Maximum number of connections to fetch ports: far more than the number of prefill instances in a fleet.
const MAX_KEEPERS: usize = 1024;
/// Maximum number of messages in a queue to or from the fetch ports.
const QUEUE: usize = 1024;
