//! The bound side of a port whose peers prove no key: a socket of the library.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use omq_tokio::options::WorkloadProfile;
use omq_tokio::{
    AuthenticationResult, Authenticator, IdentitySocket, MechanismSetup, Message, MonitorEvent,
    MonitorRecvError, MonitorStream, MonitorTryRecvError, Socket, SocketType, TrySendError,
};
use protocol::receiver::Route;
use tracing::{debug, warn};

use super::{
    BindError, Closed, FromPeer, MESSAGES_BEFORE_LOST, SendError, Traffic, bind, crowd, delimited,
    options, printable, rare,
};

/// A bound ROUTER socket of the library.
pub(super) struct PlainRouter {
    socket: IdentitySocket,
    monitor: MonitorStream,
    port: u16,
    peers: HashMap<Route, Peer>,
    /// Routes that the caller knows and whose connection has ended. [`Self::recv`] reports them as [`FromPeer::Lost`].
    lost: VecDeque<Route>,
    /// Number of messages that may still be delivered before the first entry of `lost` is reported.
    before_lost: usize,
    /// Connections that the server must end, because there are too many or because the caller called
    /// [`Self::disconnect`].
    evict: VecDeque<Route>,
    /// True if monitor events were missed. `peers` must then be compared with the socket's own
    /// table.
    stale: bool,
    traffic: Traffic,
}

#[derive(Debug)]
struct Peer {
    identity: Bytes,
    address: String,
    delimited: bool,
    connected: bool,
    /// True if the server is going to end the connection.
    leaving: bool,
    /// True if the caller has received a message of this route.
    known: bool,
    heard: Instant,
}

impl PlainRouter {
    /// Binds `host:port`. Port 0 takes any free port, which [`PlainRouter::port`] returns.
    ///
    /// # Errors
    /// See [`BindError`].
    pub(super) async fn bind(host: &str, port: u16, max_message: usize) -> Result<Self, BindError> {
        let mut options = options(max_message)
            .router_mandatory(true)
            .workload_profile(WorkloadProfile::Latency);
        options.mechanism = each_its_own();
        let socket = Socket::new(SocketType::Router, options);
        let monitor = socket.monitor();
        let port = bind(&socket, host, port).await?;
        Ok(Self {
            socket: socket
                .identity_routing()
                .expect("a ROUTER routes by identity"),
            monitor,
            port,
            peers: HashMap::new(),
            lost: VecDeque::new(),
            before_lost: 0,
            evict: VecDeque::new(),
            stale: false,
            traffic: Traffic::default(),
        })
    }

    /// Returns the port that was bound.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Waits for the next message or loss. A connection's messages are returned before its loss.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn recv(&mut self) -> Result<FromPeer, Closed> {
        loop {
            self.watch();
            self.settle().await?;
            if let Some(lost) = self.next_lost(false) {
                return Ok(lost);
            }
            match self.socket.try_recv_from() {
                Ok((identity, body)) => {
                    if let Some(message) = self.accept(&identity, &body) {
                        return Ok(message);
                    }
                    continue;
                }
                Err(omq_tokio::Error::WouldBlock) => {}
                Err(_) => return Err(Closed),
            }
            if let Some(lost) = self.next_lost(true) {
                return Ok(lost);
            }
            tokio::select! {
                biased;
                event = self.monitor.recv() => match event {
                    Ok(event) => self.note(event),
                    Err(MonitorRecvError::Closed) => return Err(Closed),
                    Err(_) => self.stale = true,
                },
                received = self.socket.recv_from() => {
                    let (identity, body) = received.map_err(|_| Closed)?;
                    // The event of a new connection comes before the connection's messages, so the events must be read
                    // first.
                    self.watch();
                    if let Some(message) = self.accept(&identity, &body) {
                        return Ok(message);
                    }
                }
            }
        }
    }

    /// Queues a message to a peer, with a delimiter frame if the peer sends delimiter frames. Never waits.
    ///
    /// # Errors
    /// See [`SendError`].
    pub(super) fn send(&mut self, route: Route, payload: Bytes) -> Result<(), SendError> {
        // If a peer reconnected under the same identity, this call notes the end of the older connection. Without this
        // call the answer could go to the wrong connection.
        self.watch();
        let peer = self
            .peers
            .get(&route)
            .filter(|peer| peer.connected)
            .ok_or(SendError::Gone)?;
        let body = if peer.delimited {
            delimited(payload)
        } else {
            Message::single(payload)
        };
        match self.socket.try_send_to(&peer.identity, body) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                let total = self.traffic.unread();
                if rare(total) {
                    warn!(peer = %peer.address, port = self.port, total,
                        "answer dropped: the peer does not read");
                }
                Err(SendError::Full)
            }
            Err(_) => Err(SendError::Gone),
        }
    }

    /// Ends a connection, e.g. of a peer that sends malformed messages. [`FromPeer::Lost`] follows.
    pub(super) fn disconnect(&mut self, route: Route) {
        if let Some(peer) = self.peers.get_mut(&route)
            && !std::mem::replace(&mut peer.leaving, true)
        {
            self.evict.push_back(route);
        }
    }

    /// Returns a name for the peer: the identity that the peer chose, as text, or the peer's address if the peer chose
    /// no identity. Logs show this name. A peer whose messages contain no name has only this name.
    pub(super) fn name(&self, route: Route) -> Option<String> {
        self.peers.get(&route).map(Peer::name)
    }

    /// Returns the peer's address, `ip:port`; `None` if the route has ended.
    pub(super) fn address(&self, route: Route) -> Option<&str> {
        self.peers.get(&route).map(|peer| peer.address.as_str())
    }

    /// Returns the counters of the port, which the port continues to update.
    pub(super) fn traffic(&self) -> Traffic {
        self.traffic.clone()
    }

    /// Stops listening and sends queued answers for at most 300 ms.
    pub(super) async fn close(self) {
        if let Err(error) = self.socket.into_inner().close().await {
            debug!(port = self.port, %error, "closing the port");
        }
    }

    /// Reads the connection events that are queued.
    fn watch(&mut self) {
        loop {
            match self.monitor.try_recv() {
                Ok(event) => self.note(event),
                Err(MonitorTryRecvError::Lagged(_)) => self.stale = true,
                Err(_) => return,
            }
        }
    }

    fn note(&mut self, event: MonitorEvent) {
        match event {
            MonitorEvent::HandshakeSucceeded { peer, .. } => {
                let route = Route(peer.connection_id);
                let address = peer
                    .peer_address
                    .map_or_else(String::new, |a| a.to_string());
                let identity = peer.peer_identity.clone().unwrap_or_default();
                debug!(peer = %address, port = self.port, "peer connected");
                self.peers
                    .entry(route)
                    .or_insert_with(|| Peer::new(identity, address));
                self.make_room(route);
                self.count();
            }
            MonitorEvent::Disconnected { peer, reason, .. } => {
                let route = Route(peer.connection_id);
                debug!(
                    ?reason,
                    port = self.port,
                    route = route.0,
                    "peer disconnected"
                );
                self.forget(route);
            }
            MonitorEvent::HandshakeFailed {
                peer_ident, reason, ..
            } => {
                let total = self.traffic.failed_handshake();
                if rare(total) {
                    warn!(peer = %peer_ident, port = self.port, %reason, total, "not a ZeroMQ peer");
                }
            }
            _ => {}
        }
    }

    fn forget(&mut self, route: Route) {
        let Some(peer) = self.peers.get_mut(&route) else {
            return;
        };
        if peer.known && peer.connected {
            peer.connected = false;
            if self.lost.is_empty() {
                self.before_lost = MESSAGES_BEFORE_LOST;
            }
            self.lost.push_back(route);
        } else if !peer.known {
            self.peers.remove(&route);
        }
        self.count();
    }

    fn count(&self) {
        let now = self.peers.values().filter(|peer| peer.connected).count();
        self.traffic.connected(now);
    }

    /// Ends one connection if there are too many; [`crowd::victim`] chooses it.
    fn make_room(&mut self, newcomer: Route) {
        let staying = self.peers.iter().filter(|(_, p)| p.connected && !p.leaving);
        let connections: Vec<_> = staying
            .map(|(route, peer)| crowd::Connection {
                route: *route,
                party: peer.host(),
                known: peer.known,
                heard: peer.heard,
            })
            .collect();
        if let Some(victim) = crowd::victim(&connections, newcomer) {
            crowd::note(&self.traffic, self.port);
            self.disconnect(victim);
        }
    }

    /// Does the work that needs the socket's task: ends connections, and reads the socket's table of connections after
    /// missed events.
    async fn settle(&mut self) -> Result<(), Closed> {
        while let Some(route) = self.evict.front() {
            // Any other error means that the connection has already ended.
            let ended = self.socket.disconnect_peer(route.0).await;
            if let Err(omq_tokio::Error::Closed) = ended {
                return Err(Closed);
            }
            self.evict.pop_front();
        }
        if self.stale {
            let now = self.socket.connections().await.map_err(|_| Closed)?;
            self.stale = false;
            let gone: Vec<Route> = self
                .peers
                .keys()
                .filter(|route| !now.iter().any(|c| c.connection_id == route.0))
                .copied()
                .collect();
            for route in gone {
                self.forget(route);
            }
            for connection in now {
                if let Some(info) = connection.peer_info {
                    self.note(MonitorEvent::HandshakeSucceeded {
                        endpoint: connection.endpoint,
                        peer: info,
                    });
                }
            }
        }
        Ok(())
    }

    fn next_lost(&mut self, idle: bool) -> Option<FromPeer> {
        if !idle && self.before_lost > 0 {
            return None;
        }
        let route = self.lost.pop_front()?;
        self.before_lost = MESSAGES_BEFORE_LOST;
        self.peers.remove(&route);
        Some(FromPeer::Lost(route))
    }

    fn accept(&mut self, identity: &omq_tokio::Identity, body: &Message) -> Option<FromPeer> {
        self.before_lost = self.before_lost.saturating_sub(1);
        let info = identity.peer_info();
        let route = Route(info.connection_id);
        let delimited = match body.len() {
            1 => false,
            2 if body.part_slice(0) == Some(&[]) => true,
            frames => {
                let total = self.traffic.wrong_frames();
                if rare(total) {
                    warn!(
                        route = route.0,
                        port = self.port,
                        frames,
                        total,
                        "message dropped: wrong number of frames"
                    );
                }
                return None;
            }
        };
        let payload = body.part_bytes(body.len() - 1)?;
        let peer = self.peers.entry(route).or_insert_with(|| {
            // The route is not in the table, because its loss was reported already or the event of its connection was
            // missed. The socket's own table tells these two cases apart.
            self.stale = true;
            let address = info
                .peer_address
                .map_or_else(String::new, |a| a.to_string());
            Peer::new(Bytes::new(), address)
        });
        peer.identity = identity.to_bytes();
        peer.delimited = delimited;
        peer.known = true;
        peer.heard = Instant::now();
        Some(FromPeer::Message(route, payload))
    }
}

/// Returns a mechanism that prevents a peer from taking over the identity of an open connection. The library moves an
/// identity only to a new connection of the same user, and with this mechanism each connection has its own user. A
/// sender that lost its connection can use its identity again as soon as this port has noticed the loss, after
/// [`HEARTBEAT_TIMEOUT`](super::HEARTBEAT_TIMEOUT) at the latest.
fn each_its_own() -> MechanismSetup {
    let next = AtomicU64::new(0);
    let authenticator = Authenticator::new_with_result(move |_| {
        let user = next.fetch_add(1, Ordering::Relaxed).to_le_bytes();
        AuthenticationResult::allow().with_user_id(user.to_vec())
    });
    MechanismSetup::NullServer { authenticator }
}

impl fmt::Debug for PlainRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlainRouter")
            .field("port", &self.port)
            .field("traffic", &self.traffic)
            .finish_non_exhaustive()
    }
}

impl Peer {
    fn new(identity: Bytes, address: String) -> Self {
        Self {
            identity,
            address,
            delimited: true,
            connected: true,
            leaving: false,
            known: false,
            heard: Instant::now(),
        }
    }

    fn host(&self) -> &str {
        let address = self.address.as_str();
        address.rsplit_once(':').map_or(address, |(host, _)| host)
    }

    fn name(&self) -> String {
        // An identity that the library generated begins with a zero byte and is not a name.
        match self.identity.first() {
            None | Some(0) => self.address.clone(),
            Some(_) => printable(&self.identity),
        }
    }
}
