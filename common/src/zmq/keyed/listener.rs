//! Accepts connections and runs their handshakes, with bounds.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use omq_tokio::proto::SocketType;
use omq_tokio::proto::connection::Role as Side;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{Id, JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Keyed;
use super::link::{Driver, Events, Link, Ours, link};
use super::stream::{Made, Refused, accept};
use crate::identity::{self, Expected, Member, PublicKey};
use crate::zmq::{HANDSHAKE_TIMEOUT, MAX_PEERS, Traffic, rare};

/// A connection whose TLS handshake is done. ZeroMQ's handshake follows.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) route: u64,
    pub(super) address: SocketAddr,
    pub(super) owner: Option<(PublicKey, Member)>,
    pub(super) link: Link,
    /// Tells the listener that ZeroMQ's handshake has ended, so that the connection no longer counts as a handshake.
    pub(super) greeted: oneshot::Sender<()>,
}

/// The task that accepts connections. It ends when its token is cancelled.
pub(super) struct Listener {
    pub(super) socket: TcpListener,
    pub(super) keyed: Keyed,
    /// The socket of connections with a key.
    pub(super) ours: Ours,
    /// The type of the socket for peers without a key.
    pub(super) plain: SocketType,
    pub(super) traffic: Traffic,
    pub(super) joined: mpsc::Sender<Joined>,
    pub(super) events: Events,
    pub(super) stop: CancellationToken,
}

impl Listener {
    pub(super) async fn run(self) {
        let expected = Expected {
            roles: self.keyed.roles,
            ..Expected::default()
        };
        let config = identity::server(&self.keyed.identity, expected);
        let mut handshakes: JoinSet<Option<(Driver, oneshot::Receiver<()>)>> = JoinSet::new();
        let mut connections = JoinSet::new();
        let mut shares = Shares::default();
        let mut next = 1u64;
        let port = self.socket.local_addr().map_or(0, |at| at.port());
        loop {
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                Some(ended) = connections.join_next_with_id() => {
                    shares.ended(id(&ended));
                }
                Some(ended) = handshakes.join_next_with_id() => {
                    let address = shares.ended(id(&ended));
                    if let Ok((_, Some((driver, greeted)))) = ended {
                        // The connection counts as a handshake until ZeroMQ's handshake has ended, too.
                        let task = handshakes.spawn(async move {
                            tokio::select! {
                                biased;
                                greeted = greeted => drop(greeted),
                                () = tokio::time::sleep(HANDSHAKE_TIMEOUT) => {}
                            }
                            None
                        });
                        if let Some(address) = address {
                            shares.begins(task.id(), address);
                        }
                        connections.spawn(async move {
                            if let Err(error) = driver.run().await {
                                debug!(%error, "a connection has ended");
                            }
                        });
                    }
                }
                accepted = self.socket.accept() => {
                    let Ok((tcp, address)) = accepted else {
                        // Without descriptors every accept fails at once; other connections must end first.
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    };
                    if connections.len() >= MAX_PEERS + MAX_HANDSHAKES || !shares.has_room(address.ip()) {
                        let text = "too many handshakes at the same time";
                        self.refuse(port, address, &Refused { reason: "flood", text: text.to_owned() });
                        continue;
                    }
                    let route = next;
                    next += 1;
                    let config = Arc::clone(&config);
                    let (keyed, ours, plain) = (self.keyed.clone(), self.ours.clone(), self.plain);
                    let (traffic, joined, events) =
                        (self.traffic.clone(), self.joined.clone(), self.events.clone());
                    let task = handshakes.spawn(async move {
                        match handshake(tcp, &keyed, config).await {
                            Ok((stream, owner)) => {
                                let socket = if stream.is_keyed() { ours.socket } else { plain };
                                let ours = Ours { socket, role: Side::Server, ..ours };
                                let (driver, link) = link(stream, route, &ours, events);
                                let (greeted, greeting) = oneshot::channel();
                                let newcomer = Joined { route, address, owner, link, greeted };
                                joined.send(newcomer).await.ok()?;
                                Some((driver, greeting))
                            }
                            Err(refused) => {
                                log(&traffic, port, address, &refused);
                                None
                            }
                        }
                    });
                    shares.begins(task.id(), address.ip());
                }
            }
        }
        handshakes.shutdown().await;
        // The router has asked each connection to send its last messages and to end.
        while connections.join_next().await.is_some() {}
    }

    fn refuse(&self, port: u16, address: SocketAddr, refused: &Refused) {
        log(&self.traffic, port, address, refused);
    }
}

async fn handshake(
    tcp: TcpStream,
    keyed: &Keyed,
    config: Arc<tokio_rustls::rustls::ServerConfig>,
) -> Result<Made, Refused> {
    let made = tokio::time::timeout(HANDSHAKE_TIMEOUT, accept(tcp, keyed, config)).await;
    made.unwrap_or_else(|_| {
        Err(Refused {
            reason: "timeout",
            text: format!("no handshake within {HANDSHAKE_TIMEOUT:?}"),
        })
    })
}

/// Counts a refused handshake by its reason, and logs the peer's address. Each reason is logged at the counts 1, 2, 4,
/// 8, …, so that a hostile peer cannot fill the log.
fn log(traffic: &Traffic, port: u16, address: SocketAddr, refused: &Refused) {
    let total = traffic.refused(refused.reason);
    if rare(total) {
        warn!(peer = %address, port, reason = refused.reason, total, "handshake refused: {}", refused.text);
    }
}

/// The number of handshakes of each address.
#[derive(Debug, Default)]
struct Shares {
    of: HashMap<IpAddr, usize>,
    tasks: HashMap<Id, IpAddr>,
}

impl Shares {
    /// Returns true if an address may begin a handshake. One address may have a quarter of all handshakes.
    fn has_room(&self, address: IpAddr) -> bool {
        let own = self.of.get(&address).copied().unwrap_or_default();
        self.tasks.len() < MAX_HANDSHAKES && own * 4 < MAX_HANDSHAKES
    }

    fn begins(&mut self, task: Id, address: IpAddr) {
        *self.of.entry(address).or_default() += 1;
        self.tasks.insert(task, address);
    }

    fn ended(&mut self, task: Id) -> Option<IpAddr> {
        let address = self.tasks.remove(&task)?;
        if let Some(count) = self.of.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.of.remove(&address);
            }
        }
        Some(address)
    }
}

fn id<T>(ended: &Result<(Id, T), tokio::task::JoinError>) -> Id {
    match ended {
        Ok((id, _)) => *id,
        Err(error) => error.id(),
    }
}

/// Maximum number of handshakes of one port at the same time. A handshake needs less than a millisecond of a core, and
/// a silent peer ends after [`HANDSHAKE_TIMEOUT`].
const MAX_HANDSHAKES: usize = 512;
/// Time until the next attempt after a failed accept.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);
