//! The sidecar's ZeroMQ sockets: the only file that names the library.
//!
//! Everything here is bounded, because the ports are open to whoever reaches them: message size,
//! handshakes, connections, queues in both directions. Sends never wait: a peer that does not read
//! costs its own messages and nobody's time. The sockets live on the caller's runtime.
//!
//! A [`Route`] is one *connection*, not one identity: a peer that comes back under the same identity
//! gets another route, so that an answer can never reach a stranger who took the name over.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::time::{Duration, Instant};

use bytes::Bytes;
use omq_tokio::endpoint::Host;
use omq_tokio::options::{KeepAlive, WorkloadProfile};
use omq_tokio::{
    Endpoint, IdentitySocket, Message, MonitorEvent, MonitorRecvError, MonitorStream,
    MonitorTryRecvError, Options, ReconnectPolicy, Socket, SocketType, TrySendError,
};
use protocol::receiver::Route;
use tracing::{debug, warn};

/// Longest message on an alloc port. A request of 4096 keys (a million tokens in chunks of 256) with
/// a model name of 100 characters has 600 KB.
pub(crate) const MAX_ALLOC_BYTES: usize = 1 << 20;
/// Longest message on an init port: a descriptor list of 24 bytes a slot; 170,000 slots.
pub(crate) const MAX_INIT_BYTES: usize = 4 << 20;
/// Longest message on the registration port.
pub(crate) const MAX_REGISTRATION_BYTES: usize = 64 << 10;

/// A bound ROUTER socket: the init or the alloc port.
///
/// Serves REQ and DEALER peers, the latter with or without the empty delimiter frame; answers take
/// the form that the peer used.
pub(crate) struct RouterServer {
    socket: IdentitySocket,
    monitor: MonitorStream,
    port: u16,
    peers: HashMap<Route, Peer>,
    /// Routes whose connection ended, and which the caller knows.
    lost: VecDeque<Route>,
    /// Messages that may still be delivered before the front of `lost`.
    before_lost: usize,
    /// Connections to end: too many, or the caller's wish.
    evict: VecDeque<Route>,
    /// Monitor events were missed: the table must be compared with the socket's own.
    stale: bool,
    stats: RouterStats,
}

/// What a [`RouterServer`] has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RouterStats {
    /// Connections now.
    pub(crate) peers: usize,
    /// Messages that had the wrong frames.
    pub(crate) malformed: u64,
    /// Connections ended to make room for others.
    pub(crate) evicted: u64,
    /// Answers dropped because the peer did not read.
    pub(crate) unread: u64,
    /// Connections that did not get through ZeroMQ's own handshake.
    pub(crate) failed_handshakes: u64,
}

#[derive(Debug)]
struct Peer {
    identity: Bytes,
    address: String,
    delimited: bool,
    connected: bool,
    /// Its end has been asked for.
    leaving: bool,
    /// The caller has seen this route.
    known: bool,
    heard: Instant,
}

/// What [`RouterServer::recv`] yields.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum FromPeer {
    /// A message.
    Message(Route, Bytes),
    /// A connection of which messages were delivered has ended. The route is not used again.
    Lost(Route),
}

/// The socket's own task is gone; nothing will come any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ZeroMQ socket is closed")]
pub(crate) struct Closed;

/// Why a message was not taken. None of them waits or retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SendError {
    /// The queue to this peer is full: it does not read.
    #[error("the peer does not read its messages")]
    Full,
    /// The connection has ended.
    #[error("the peer's connection has ended")]
    Gone,
}

/// A port that could not be bound.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// Somebody else listens there.
    #[error("{host}:{port} is taken by {holder}")]
    InUse {
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
        /// The process, or that it is not known.
        holder: String,
    },
    /// The host is not this machine's, the port is privileged, ….
    #[error("cannot listen on {host}:{port}: {cause}")]
    Refused {
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
        /// The kernel's or resolver's word.
        cause: String,
    },
}

impl RouterServer {
    /// Binds `host:port`; port 0 takes any ([`RouterServer::port`] says which).
    ///
    /// # Errors
    /// See [`BindError`].
    pub(crate) async fn bind(host: &str, port: u16, max_message: usize) -> Result<Self, BindError> {
        let options = options(max_message)
            .router_mandatory(true)
            .workload_profile(WorkloadProfile::Latency);
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
            stats: RouterStats::default(),
        })
    }

    /// The port that is bound.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Waits for the next message or loss. Messages of a connection come before its loss.
    ///
    /// # Errors
    /// Only when the socket's own task is gone.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn recv(&mut self) -> Result<FromPeer, Closed> {
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
                    // The connection's own events precede its messages.
                    self.watch();
                    if let Some(message) = self.accept(&identity, &body) {
                        return Ok(message);
                    }
                }
            }
        }
    }

    /// Queues a message to a peer, in the form that the peer uses. Never waits.
    ///
    /// # Errors
    /// See [`SendError`].
    pub(crate) fn send(
        &mut self,
        route: Route,
        payload: impl Into<Bytes>,
    ) -> Result<(), SendError> {
        // Of two connections under one name the older is then known to be gone.
        self.watch();
        let peer = self
            .peers
            .get(&route)
            .filter(|peer| peer.connected)
            .ok_or(SendError::Gone)?;
        let body = if peer.delimited {
            delimited(payload.into())
        } else {
            Message::single(payload.into())
        };
        match self.socket.try_send_to(&peer.identity, body) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                self.stats.unread += 1;
                if rare(self.stats.unread) {
                    warn!(peer = %peer.address, port = self.port, total = self.stats.unread,
                        "answer dropped: the peer does not read");
                }
                Err(SendError::Full)
            }
            Err(_) => Err(SendError::Gone),
        }
    }

    /// Ends a connection, e.g. of a peer that talks nonsense. [`FromPeer::Lost`] follows.
    pub(crate) fn disconnect(&mut self, route: Route) {
        if let Some(peer) = self.peers.get_mut(&route)
            && !std::mem::replace(&mut peer.leaving, true)
        {
            self.evict.push_back(route);
        }
    }

    /// The identity that the peer chose, as text, or its address if it chose none. For logs and as
    /// the name of a peer that has no other.
    pub(crate) fn name(&self, route: Route) -> Option<String> {
        self.peers.get(&route).map(Peer::name)
    }

    /// What has been seen so far.
    pub(crate) fn stats(&self) -> RouterStats {
        RouterStats {
            peers: self.peers.values().filter(|p| p.connected).count(),
            ..self.stats
        }
    }

    /// Stops listening and flushes queued answers for at most [`LINGER`].
    pub(crate) async fn close(self) {
        if let Err(error) = self.socket.into_inner().close().await {
            debug!(port = self.port, %error, "closing the port");
        }
    }

    /// Takes in the connection events that have happened.
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
                self.stats.failed_handshakes += 1;
                if rare(self.stats.failed_handshakes) {
                    warn!(peer = %peer_ident, port = self.port, %reason,
                        total = self.stats.failed_handshakes, "not a ZeroMQ peer");
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
    }

    /// Over the cap, ends the connection that has been silent longest: first one that never spoke.
    fn make_room(&mut self, newcomer: Route) {
        let staying = |peer: &Peer| peer.connected && !peer.leaving;
        if self.peers.values().filter(|peer| staying(peer)).count() <= MAX_PEERS {
            return;
        }
        let victim = self
            .peers
            .iter()
            .filter(|(route, peer)| staying(peer) && **route != newcomer)
            .min_by_key(|(_, peer)| (peer.known, peer.heard))
            .map(|(route, _)| *route);
        if let Some(victim) = victim {
            self.stats.evicted += 1;
            if rare(self.stats.evicted) {
                warn!(
                    port = self.port,
                    limit = MAX_PEERS,
                    total = self.stats.evicted,
                    "too many connections: the one silent for longest is ended"
                );
            }
            self.disconnect(victim);
        }
    }

    /// Does what needs the socket's task: evictions, and a fresh look after missed events.
    async fn settle(&mut self) -> Result<(), Closed> {
        while let Some(route) = self.evict.front() {
            // An error says that the connection has ended by itself.
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
                self.stats.malformed += 1;
                if rare(self.stats.malformed) {
                    warn!(
                        route = route.0,
                        port = self.port,
                        frames,
                        total = self.stats.malformed,
                        "message with wrong frames dropped"
                    );
                }
                return None;
            }
        };
        let payload = body.part_bytes(body.len() - 1)?;
        let peer = self.peers.entry(route).or_insert_with(|| {
            // Its loss has been reported already, or its arrival was missed. The next look at the
            // socket's table tells which.
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

impl fmt::Debug for RouterServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterServer")
            .field("port", &self.port)
            .field("stats", &self.stats())
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

    fn name(&self) -> String {
        // A generated identity begins with a zero byte.
        match self.identity.first() {
            None | Some(0) => self.address.clone(),
            Some(_) => String::from_utf8_lossy(&self.identity)
                .chars()
                .map(|c| if c.is_control() { '.' } else { c })
                .collect(),
        }
    }
}

/// A DEALER socket to one receiver's alloc port. Reconnects by itself.
pub(crate) struct DealerClient {
    socket: Socket,
    monitor: MonitorStream,
    endpoint: Endpoint,
    connected: bool,
    /// Losses and arrivals that the caller has not seen.
    news: VecDeque<FromServer>,
    /// The library gave up on a refused handshake: when to start anew.
    redial: Option<tokio::time::Instant>,
}

/// What [`DealerClient::recv`] yields.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum FromServer {
    /// The connection stands (again).
    Connected,
    /// A message.
    Message(Bytes),
    /// The connection has ended; the next attempts are under way.
    Lost,
}

impl DealerClient {
    /// Begins to connect. `identity` (at most 255 bytes, not guessable: whoever presents it takes the
    /// connection over) names this sender at the receiver.
    pub(crate) async fn connect(host: &str, port: u16, identity: &str) -> Result<Self, Closed> {
        let mut identity = Bytes::copy_from_slice(identity.as_bytes());
        identity.truncate(255);
        let options = options(MAX_ALLOC_BYTES)
            .identity(identity)
            .workload_profile(WorkloadProfile::Latency);
        let socket = Socket::new(SocketType::Dealer, options);
        let monitor = socket.monitor();
        let endpoint = endpoint(host, port);
        socket.connect(endpoint.clone()).await.map_err(|_| Closed)?;
        Ok(Self {
            socket,
            monitor,
            endpoint,
            connected: false,
            news: VecDeque::new(),
            redial: None,
        })
    }

    /// Waits for a message or a change of the connection.
    ///
    /// # Errors
    /// Only when the socket's own task is gone.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn recv(&mut self) -> Result<FromServer, Closed> {
        loop {
            while let Ok(event) = self.monitor.try_recv() {
                self.note(&event);
            }
            // An arrival precedes the messages that follow it, a loss follows those before it.
            if self.news.iter().any(|news| *news != FromServer::Lost)
                && let Some(news) = self.news.pop_front()
            {
                return Ok(news);
            }
            match self.socket.try_recv() {
                Ok(message) => match payload(&message) {
                    Some(payload) => return Ok(FromServer::Message(payload)),
                    None => continue,
                },
                Err(omq_tokio::Error::WouldBlock) => {}
                Err(_) => return Err(Closed),
            }
            if let Some(news) = self.news.pop_front() {
                return Ok(news);
            }
            let redial = self.redial;
            tokio::select! {
                biased;
                event = self.monitor.recv() => match event {
                    Ok(event) => self.note(&event),
                    Err(MonitorRecvError::Closed) => return Err(Closed),
                    Err(_) => {}
                },
                message = self.socket.recv() => {
                    if let Some(payload) = payload(&message.map_err(|_| Closed)?) {
                        while let Ok(event) = self.monitor.try_recv() {
                            self.note(&event);
                        }
                        if self.news.contains(&FromServer::Connected) {
                            self.news.push_back(FromServer::Message(payload));
                            continue;
                        }
                        return Ok(FromServer::Message(payload));
                    }
                }
                () = tokio::time::sleep_until(redial.unwrap_or_else(tokio::time::Instant::now)),
                    if redial.is_some() =>
                {
                    self.redial = None;
                    self.socket.connect(self.endpoint.clone()).await.map_err(|_| Closed)?;
                }
            }
        }
    }

    /// Queues a message. Before the first connection and between two it waits in the queue. Never
    /// waits itself.
    ///
    /// # Errors
    /// See [`SendError`].
    pub(crate) fn send(&self, payload: impl Into<Bytes>) -> Result<(), SendError> {
        match self.socket.try_send(delimited(payload.into())) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err(SendError::Full),
            Err(_) => Err(SendError::Gone),
        }
    }

    /// Disconnects after flushing queued messages for at most [`LINGER`].
    pub(crate) async fn close(self) {
        if let Err(error) = self.socket.close().await {
            debug!(endpoint = %self.endpoint, %error, "closing the connection");
        }
    }

    fn note(&mut self, event: &MonitorEvent) {
        match event {
            MonitorEvent::HandshakeSucceeded { .. } => {
                self.connected = true;
                self.news.push_back(FromServer::Connected);
            }
            MonitorEvent::Disconnected { reason, .. } if self.connected => {
                debug!(endpoint = %self.endpoint, ?reason, "receiver's connection ended");
                self.connected = false;
                self.news.push_back(FromServer::Lost);
            }
            MonitorEvent::HandshakeFailed { reason, .. } => {
                debug!(endpoint = %self.endpoint, %reason, "not a ZeroMQ peer");
            }
            MonitorEvent::ConnectStopped { .. } => {
                self.redial = Some(tokio::time::Instant::now() + RECONNECT_MAX);
            }
            _ => {}
        }
    }
}

impl fmt::Debug for DealerClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DealerClient")
            .field("endpoint", &self.endpoint.to_string())
            .field("connected", &self.connected)
            .finish_non_exhaustive()
    }
}

/// A throw-away REQ socket: the init handshake's client.
#[derive(Debug)]
pub(crate) struct Requester {
    socket: Socket,
    monitor: MonitorStream,
    peer: String,
}

/// Why there was no reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// Nobody listens there, or it is no ZeroMQ peer.
    #[error("no connection to {peer}: {cause}")]
    NoConnection {
        /// `host:port`.
        peer: String,
        /// The last failure.
        cause: String,
    },
    /// It connected and did not answer, or left.
    #[error("{peer} ended the connection without an answer")]
    NoReply {
        /// `host:port`.
        peer: String,
    },
}

impl Requester {
    /// Begins to connect.
    pub(crate) async fn connect(host: &str, port: u16) -> Result<Self, RequestError> {
        let socket = Socket::new(
            SocketType::Req,
            options(MAX_INIT_BYTES).linger(Duration::ZERO),
        );
        let monitor = socket.monitor();
        let peer = format!("{host}:{port}");
        match socket.connect(endpoint(host, port)).await {
            Ok(()) => Ok(Self {
                socket,
                monitor,
                peer,
            }),
            Err(error) => Err(RequestError::NoConnection {
                peer,
                cause: error.to_string(),
            }),
        }
    }

    /// Sends a request and waits for its reply. The caller sets the deadline.
    ///
    /// # Errors
    /// See [`RequestError`].
    ///
    /// # Cancel safety
    /// Not safe: a requester whose request was cancelled is to be dropped.
    pub(crate) async fn request(
        &mut self,
        payload: impl Into<Bytes>,
    ) -> Result<Bytes, RequestError> {
        let began = Instant::now();
        if self
            .socket
            .send(Message::single(payload.into()))
            .await
            .is_err()
        {
            return Err(self.no_reply());
        }
        loop {
            tokio::select! {
                biased;
                reply = self.socket.recv() => {
                    let reply = reply.map_err(|_| self.no_reply())?;
                    return reply.part_bytes(reply.len().saturating_sub(1)).ok_or_else(|| self.no_reply());
                }
                event = self.monitor.recv() => match event {
                    Ok(MonitorEvent::ConnectDelayed { attempt, .. })
                        if began.elapsed() >= CONNECT_GRACE =>
                    {
                        return Err(RequestError::NoConnection {
                            peer: self.peer.clone(),
                            cause: format!("{attempt} attempts failed"),
                        });
                    }
                    Ok(MonitorEvent::HandshakeFailed { reason, .. }) => {
                        return Err(RequestError::NoConnection { peer: self.peer.clone(), cause: reason });
                    }
                    Ok(MonitorEvent::Disconnected { .. }) | Err(MonitorRecvError::Closed) => {
                        return Err(self.no_reply());
                    }
                    _ => {}
                }
            }
        }
    }

    fn no_reply(&self) -> RequestError {
        RequestError::NoReply {
            peer: self.peer.clone(),
        }
    }
}

/// A PUSH socket to the proxy's registration port. Reconnects by itself.
#[derive(Debug)]
pub(crate) struct Push {
    socket: Socket,
    peer: String,
    dropped: u64,
}

impl Push {
    /// Begins to connect.
    pub(crate) async fn connect(host: &str, port: u16) -> Result<Self, Closed> {
        let options = options(MAX_REGISTRATION_BYTES).linger(PUSH_LINGER);
        let socket = Socket::new(SocketType::Push, options);
        socket
            .connect(endpoint(host, port))
            .await
            .map_err(|_| Closed)?;
        Ok(Self {
            socket,
            peer: format!("{host}:{port}"),
            dropped: 0,
        })
    }

    /// Queues a message, or drops and counts it if the proxy is away for so long that the queue is
    /// full. Never waits.
    ///
    /// # Errors
    /// See [`SendError`].
    pub(crate) fn send(&mut self, payload: impl Into<Bytes>) -> Result<(), SendError> {
        match self.socket.try_send(Message::single(payload.into())) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.dropped += 1;
                if rare(self.dropped) {
                    warn!(proxy = %self.peer, total = self.dropped,
                        "message to the proxy dropped: it does not take them");
                }
                Err(match error {
                    TrySendError::Full(_) => SendError::Full,
                    _ => SendError::Gone,
                })
            }
        }
    }

    /// Messages dropped so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Disconnects after flushing queued messages for at most [`PUSH_LINGER`].
    pub(crate) async fn close(self) {
        if let Err(error) = self.socket.close().await {
            debug!(proxy = %self.peer, %error, "closing the connection");
        }
    }
}

/// A bound PULL socket: the registration port, for tests and tools.
#[derive(Debug)]
pub(crate) struct Pull {
    socket: Socket,
    port: u16,
}

impl Pull {
    /// Binds `host:port`; port 0 takes any.
    ///
    /// # Errors
    /// See [`BindError`].
    pub(crate) async fn bind(host: &str, port: u16) -> Result<Self, BindError> {
        let socket = Socket::new(SocketType::Pull, options(MAX_REGISTRATION_BYTES));
        let port = bind(&socket, host, port).await?;
        Ok(Self { socket, port })
    }

    /// The port that is bound.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Waits for the next message; those of several frames are dropped.
    ///
    /// # Errors
    /// Only when the socket's own task is gone.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(crate) async fn recv(&mut self) -> Result<Bytes, Closed> {
        loop {
            let message = self.socket.recv().await.map_err(|_| Closed)?;
            if message.len() == 1
                && let Some(payload) = message.part_bytes(0)
            {
                return Ok(payload);
            }
        }
    }
}

/// What every socket here has in common.
fn options(max_message: usize) -> Options {
    Options::default()
        .max_message_size(max_message)
        .max_pending_handshakes(MAX_PENDING_HANDSHAKES)
        .handshake_timeout(HANDSHAKE_TIMEOUT)
        .linger(LINGER)
        .send_hwm(SEND_QUEUE)
        .recv_hwm(RECEIVE_QUEUE)
        .transmit_slot_cap(SEND_BYTES)
        .monitor_capacity(MONITOR_EVENTS)
        .heartbeat_interval(HEARTBEAT)
        .heartbeat_timeout(HEARTBEAT_TIMEOUT)
        .heartbeat_ttl(HEARTBEAT_TIMEOUT)
        .tcp_keepalive(KeepAlive::Enabled {
            idle: Duration::from_secs(10),
            intvl: Duration::from_secs(5),
            cnt: 3,
        })
        .tcp_user_timeout(TCP_TIMEOUT)
        .reconnect(ReconnectPolicy::Exponential {
            min: RECONNECT_MIN,
            max: RECONNECT_MAX,
        })
}

fn endpoint(host: &str, port: u16) -> Endpoint {
    let bare = host
        .strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host);
    let host = match (bare, bare.parse()) {
        ("*" | "", _) => Host::Wildcard,
        (_, Ok(ip)) => Host::Ip(ip),
        (name, Err(_)) => Host::Name(name.to_owned()),
    };
    Endpoint::Tcp { host, port }
}

async fn bind(socket: &Socket, host: &str, port: u16) -> Result<u16, BindError> {
    match socket.bind(endpoint(host, port)).await {
        Ok(Endpoint::Tcp { port, .. }) => Ok(port),
        Ok(_) => Ok(port),
        Err(omq_tokio::Error::Io(e)) if e.kind() == std::io::ErrorKind::AddrInUse => {
            Err(BindError::InUse {
                host: host.to_owned(),
                port,
                holder: crate::port::holder(port)
                    .unwrap_or_else(|| "something that the kernel does not name".to_owned()),
            })
        }
        Err(error) => Err(BindError::Refused {
            host: host.to_owned(),
            port,
            cause: error.to_string(),
        }),
    }
}

/// REQ's frames around a payload.
fn delimited(payload: Bytes) -> Message {
    Message::multipart([Bytes::new(), payload])
}

/// The payload of a ROUTER's or REP's answer, with or without the empty delimiter.
fn payload(message: &Message) -> Option<Bytes> {
    match message.len() {
        1 => message.part_bytes(0),
        2 if message.part_slice(0) == Some(&[]) => message.part_bytes(1),
        frames => {
            warn!(frames, "message with wrong frames dropped");
            None
        }
    }
}

/// Logs of things that a hostile peer can repeat come at 1, 2, 4, 8, … of them.
fn rare(count: u64) -> bool {
    count.is_power_of_two()
}

/// Connections of one port. Each costs about 40 KB.
const MAX_PEERS: usize = 1024;
/// Below the library's default of 128, 500 silent connections starved every newcomer in trials.
const MAX_PENDING_HANDSHAKES: usize = 2048;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long queued messages are flushed at the end. The library's default is 0: it drops them.
const LINGER: Duration = Duration::from_millis(300);
const PUSH_LINGER: Duration = Duration::from_secs(1);
/// Messages queued to one peer.
const SEND_QUEUE: u32 = 256;
/// Messages queued from all peers of a port: at most 64 MiB on an alloc port.
const RECEIVE_QUEUE: u32 = 64;
/// Encoded bytes queued to one peer.
const SEND_BYTES: usize = 4 << 20;
/// Connection events queued. More only cost a look at the whole table.
const MONITOR_EVENTS: usize = 1024;
/// A peer whose host vanished or that was stopped is lost after [`HEARTBEAT_TIMEOUT`]; a ZMTP 3.0 peer
/// has no heartbeats, there TCP's own probes find a vanished host after 25 s.
const HEARTBEAT: Duration = Duration::from_secs(2);
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(6);
const TCP_TIMEOUT: Duration = Duration::from_secs(10);
const RECONNECT_MIN: Duration = Duration::from_millis(20);
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// A receiver that is just starting gets this long before a refused connection counts.
const CONNECT_GRACE: Duration = Duration::from_millis(500);
/// A loss waits for the messages that were received before it; the bound keeps a flood from hiding it.
const MESSAGES_BEFORE_LOST: usize = 2 * RECEIVE_QUEUE as usize;

#[cfg(test)]
mod tests;
