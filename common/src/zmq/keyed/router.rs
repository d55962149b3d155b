//! The bound side of a port whose peers prove a key.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use omq_tokio::Message;
use omq_tokio::engine::PeerEvent;
use omq_tokio::proto::connection::Role as Side;
use omq_tokio::proto::{Event, SocketType};
use protocol::receiver::Route;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::Keyed;
use super::link::{Link, Ours};
use super::listener::{Joined, Listener};
use crate::identity::{Expected, Member, PublicKey, Roster};
use crate::zmq::{
    BindError, Closed, FromPeer, RECEIVE_QUEUE, SendError, Traffic, bind_tcp, crowd, delimited,
    rare,
};

/// A bound ROUTER socket whose peers prove a key.
pub(crate) struct Router {
    keyed: Keyed,
    port: u16,
    peers: HashMap<Route, Peer>,
    joined: mpsc::Receiver<Joined>,
    events: mpsc::Receiver<(u64, PeerEvent)>,
    roster: watch::Receiver<Arc<Roster>>,
    traffic: Traffic,
    stop: CancellationToken,
    listener: JoinSet<()>,
}

struct Peer {
    link: Link,
    owner: Option<(PublicKey, Member)>,
    address: String,
    identity: Bytes,
    delimited: bool,
    /// Present until ZeroMQ's handshake is done.
    greeting: Option<oneshot::Sender<()>>,
    /// True if the caller has received a message of this route.
    known: bool,
    heard: Instant,
}

impl Router {
    /// Binds a port. Peers without a key, where they are permitted, use a socket of the type `plain`.
    pub(crate) async fn bind(
        host: &str,
        port: u16,
        max_message: usize,
        keyed: Keyed,
        plain: SocketType,
        name: &'static str,
    ) -> Result<Self, BindError> {
        let socket: TcpListener = bind_tcp(host, port).await?;
        let port = socket.local_addr().map_or(port, |at| at.port());
        let traffic = Traffic::keyed();
        let (join, joined) = mpsc::channel(JOINING);
        let (happen, events) = mpsc::channel(RECEIVE_QUEUE as usize);
        let stop = CancellationToken::new();
        let accepting = Listener {
            socket,
            keyed: keyed.clone(),
            ours: Ours {
                role: Side::Server,
                socket: SocketType::Router,
                identity: Bytes::from_static(name.as_bytes()),
                max_message,
            },
            plain,
            traffic: traffic.clone(),
            joined: join,
            events: happen,
            stop: stop.clone(),
        };
        let mut listener = JoinSet::new();
        listener.spawn(accepting.run());
        Ok(Self {
            roster: keyed.identity.changes(),
            keyed,
            port,
            peers: HashMap::new(),
            joined,
            events,
            traffic,
            stop,
            listener,
        })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic.clone()
    }

    /// Waits for the next message or loss. A connection's messages are returned before its loss.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn recv(&mut self) -> Result<FromPeer, Closed> {
        loop {
            let (number, event) = tokio::select! {
                biased;
                changed = self.roster.changed() => {
                    changed.map_err(|_| Closed)?;
                    self.revoke();
                    continue;
                }
                // A connection joins before its first event is sent.
                Some(joined) = self.joined.recv() => {
                    self.joins(joined);
                    continue;
                }
                Some(event) = self.events.recv() => event,
                else => return Err(Closed),
            };
            while let Ok(joined) = self.joined.try_recv() {
                self.joins(joined);
            }
            if let Some(news) = self.take(Route(number), event) {
                return Ok(news);
            }
        }
    }

    fn take(&mut self, route: Route, event: PeerEvent) -> Option<FromPeer> {
        let peer = self.peers.get_mut(&route)?;
        match event {
            PeerEvent::Event(Event::HandshakeSucceeded {
                peer_properties, ..
            }) => {
                peer.identity = peer_properties.identity.clone().unwrap_or_default();
                if let Some(greeting) = peer.greeting.take() {
                    greeting.send(()).ok();
                }
                peer.link.activate();
                debug!(peer = peer.address, port = self.port, "peer connected");
                self.make_room(route);
                self.count();
                None
            }
            PeerEvent::Event(Event::Message(message)) => self.message(route, &message),
            PeerEvent::Event(Event::Command(_)) => None,
            PeerEvent::Closed { error } => {
                let peer = self.peers.remove(&route)?;
                debug!(
                    ?error,
                    peer = peer.address,
                    port = self.port,
                    "peer disconnected"
                );
                if peer.greeting.is_some() {
                    let total = self.traffic.failed_handshake();
                    if rare(total) {
                        warn!(
                            peer = peer.address,
                            port = self.port,
                            ?error,
                            total,
                            "not a ZeroMQ peer"
                        );
                    }
                }
                self.count();
                peer.known.then_some(FromPeer::Lost(route))
            }
        }
    }

    fn message(&mut self, route: Route, message: &Message) -> Option<FromPeer> {
        let peer = self.peers.get_mut(&route)?;
        peer.delimited = match message.len() {
            1 => false,
            2 if message.part_slice(0) == Some(&[]) => true,
            frames => {
                let total = self.traffic.wrong_frames();
                if rare(total) {
                    warn!(
                        peer = peer.address,
                        port = self.port,
                        frames,
                        total,
                        "message dropped: wrong number of frames"
                    );
                }
                return None;
            }
        };
        peer.known = true;
        peer.heard = Instant::now();
        let payload = message.part_bytes(message.len() - 1)?;
        Some(FromPeer::Message(route, payload))
    }

    fn joins(&mut self, joined: Joined) {
        let peer = Peer {
            link: joined.link,
            owner: joined.owner,
            address: joined.address.to_string(),
            identity: Bytes::new(),
            delimited: true,
            greeting: Some(joined.greeted),
            known: false,
            heard: Instant::now(),
        };
        self.peers.insert(Route(joined.route), peer);
        // The roster may have changed between the handshake and now.
        self.revoke();
    }

    /// Ends the connections whose keys the roster no longer permits, and gives the others their present entries.
    fn revoke(&mut self) {
        let expected = Expected {
            roles: self.keyed.roles,
            ..Expected::default()
        };
        for peer in self.peers.values_mut() {
            let Some((key, member)) = &mut peer.owner else {
                continue;
            };
            match expected.check(&self.keyed.identity, key) {
                Ok(now) if now.name == member.name => {
                    // Later messages are judged by the hosts and roles of the present roster.
                    *member = now;
                    continue;
                }
                _ => {}
            }
            let total = self.traffic.refused("revoked");
            if rare(total) {
                warn!(
                    peer = peer.address,
                    name = &*member.name,
                    port = self.port,
                    total,
                    "connection ended: the roster no longer permits the key"
                );
            }
            peer.link.cut();
        }
    }

    /// Queues a message to a peer and never waits.
    pub(crate) fn send(&mut self, route: Route, payload: Bytes) -> Result<(), SendError> {
        let peer = self.peers.get(&route).ok_or(SendError::Gone)?;
        let message = if peer.delimited {
            delimited(payload)
        } else {
            Message::single(payload)
        };
        let sent = peer.link.send(message);
        if sent == Err(SendError::Full) {
            let total = self.traffic.unread();
            if rare(total) {
                warn!(
                    peer = peer.address,
                    port = self.port,
                    total,
                    "answer dropped: the peer does not read"
                );
            }
        }
        sent
    }

    pub(crate) fn disconnect(&mut self, route: Route) {
        if let Some(peer) = self.peers.get(&route) {
            peer.link.cut();
        }
    }

    pub(crate) fn name(&self, route: Route) -> Option<String> {
        let peer = self.peers.get(&route)?;
        // A key proves the name in the roster. The identity is a text that the peer has chosen.
        if let Some((_, member)) = &peer.owner {
            return Some(member.name.to_string());
        }
        Some(match peer.identity.first() {
            None | Some(0) => peer.address.clone(),
            Some(_) => crate::zmq::printable(&peer.identity),
        })
    }

    pub(crate) fn address(&self, route: Route) -> Option<&str> {
        self.peers.get(&route).map(|peer| peer.address.as_str())
    }

    /// Returns the owner of the key that the peer has proved; `None` if the peer has proved none.
    pub(crate) fn owner(&self, route: Route) -> Option<&Member> {
        let peer = self.peers.get(&route)?;
        peer.owner.as_ref().map(|(_, member)| member)
    }

    /// Stops listening and sends queued answers for at most 300 ms.
    pub(crate) async fn close(mut self) {
        self.stop.cancel();
        let mut draining = JoinSet::new();
        for (_, peer) in self.peers.drain() {
            draining.spawn(peer.link.drain());
        }
        // Nobody reads events any more. Without this the drivers could wait for room in the queue.
        self.events.close();
        let ends = async {
            while draining.join_next().await.is_some() {}
            while self.listener.join_next().await.is_some() {}
        };
        tokio::time::timeout(CLOSING, ends).await.ok();
    }

    /// Ends one connection if there are too many; [`crowd::victim`] chooses it.
    fn make_room(&mut self, newcomer: Route) {
        let peers = self.peers.iter();
        let connections: Vec<_> = peers
            .map(|(route, peer)| crowd::Connection {
                route: *route,
                party: peer.party(),
                known: peer.known,
                heard: peer.heard,
            })
            .collect();
        let victim = crowd::victim(&connections, newcomer);
        if let Some(victim) = victim.and_then(|route| self.peers.get(&route)) {
            crowd::note(&self.traffic, self.port);
            victim.link.cut();
        }
    }

    fn count(&self) {
        let greeted = self.peers.values().filter(|peer| peer.greeting.is_none());
        self.traffic.connected(greeted.count());
    }
}

impl Peer {
    /// Returns the owner of this connection for limits: the name in the roster, or the host without a key.
    fn party(&self) -> &str {
        match &self.owner {
            Some((_, member)) => &member.name,
            None => {
                let host = self.address.rsplit_once(':');
                host.map_or(self.address.as_str(), |(host, _)| host)
            }
        }
    }
}

impl fmt::Debug for Router {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Router")
            .field("port", &self.port)
            .field("peers", &self.peers.len())
            .field("traffic", &self.traffic)
            .finish_non_exhaustive()
    }
}

/// Connections whose TLS handshake is done and that the caller has not seen yet.
const JOINING: usize = 64;
/// Longest time to close a port.
const CLOSING: std::time::Duration = std::time::Duration::from_millis(700);
