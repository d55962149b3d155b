//! The connecting side of a port whose peers prove no key: a socket of the library.

use std::collections::VecDeque;
use std::fmt;

use bytes::Bytes;
use omq_tokio::options::WorkloadProfile;
use omq_tokio::{
    Endpoint, Message, MonitorEvent, MonitorRecvError, MonitorStream, Socket, SocketType,
    TrySendError,
};
use tracing::debug;

use super::{
    Closed, FromServer, MAX_ALLOC_BYTES, RECONNECT_MAX, SendError, delimited, endpoint, options,
    payload,
};

/// Maximum number of messages that wait for room in the library's queue.
const MAX_WAITING: usize = 64;

/// A DEALER socket to one receiver's alloc port. It reconnects by itself. After the socket is
/// dropped, it still sends queued messages for at most 300 ms.
pub(super) struct PlainDealer {
    socket: Socket,
    monitor: MonitorStream,
    endpoint: Endpoint,
    connected: bool,
    /// True if a failed attempt to connect counts as a loss.
    once: bool,
    /// Losses, new connections and messages that the caller has not got yet.
    news: VecDeque<FromServer>,
    /// Messages that the library refused, first to send first. The library also refuses messages for a moment while a
    /// connection begins or ends. A message that was dropped then would cost its request the whole alloc timeout.
    waiting: VecDeque<Message>,
    /// Time of the next connection attempt, if the library makes no further attempt after a refused handshake. Absent:
    /// the library connects.
    redial: Option<tokio::time::Instant>,
}

impl PlainDealer {
    /// Begins to connect. `identity` names this sender at the receiver and has at most 255 bytes. The identity must
    /// not be guessable, because the receiver accepts the first connection that uses it.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    pub(super) async fn connect(host: &str, port: u16, identity: &str) -> Result<Self, Closed> {
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
            once: false,
            news: VecDeque::new(),
            waiting: VecDeque::new(),
            redial: None,
        })
    }

    /// Begins to connect, as [`PlainDealer::connect`]. If the peer refuses the connection,
    /// [`PlainDealer::recv`] returns [`FromServer::Lost`] at once.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    pub(super) async fn connect_once(
        host: &str,
        port: u16,
        identity: &str,
    ) -> Result<Self, Closed> {
        let client = Self::connect(host, port, identity).await?;
        Ok(Self {
            once: true,
            ..client
        })
    }

    /// Waits for a message or a change of the connection.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn recv(&mut self) -> Result<FromServer, Closed> {
        loop {
            while let Ok(event) = self.monitor.try_recv() {
                self.note(&event);
            }
            // A new connection is reported before its messages. A loss is reported after the messages of the lost
            // connection.
            if self.news.iter().any(|news| *news != FromServer::Lost)
                && let Some(news) = self.news.pop_front()
            {
                return Ok(news);
            }
            // Messages that have already arrived are reported before the loss, because the peer sent them before the
            // connection was lost.
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
                () = self.socket.wait_send_ready(), if !self.waiting.is_empty() => {
                    self.send_waiting()?;
                }
                message = self.socket.recv() => {
                    if let Some(payload) = payload(&message.map_err(|_| Closed)?) {
                        while let Ok(event) = self.monitor.try_recv() {
                            self.note(&event);
                        }
                        // If the events read above include a new connection, this message belongs
                        // to that connection and must be reported after its event.
                        let arrived = |news: &FromServer| matches!(news, FromServer::Connected { .. });
                        if self.news.iter().any(arrived) {
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

    /// Queues a message and never waits. While there is no connection, the message stays in the queue.
    ///
    /// # Errors
    /// See [`SendError`].
    pub(super) fn send(&mut self, payload: Bytes) -> Result<(), SendError> {
        if self.waiting.len() >= MAX_WAITING {
            return Err(SendError::Full);
        }
        self.waiting.push_back(delimited(payload));
        self.send_waiting().map_err(|Closed| SendError::Gone)
    }

    /// Gives the waiting messages to the library, until the library refuses one.
    fn send_waiting(&mut self) -> Result<(), Closed> {
        while let Some(message) = self.waiting.pop_front() {
            match self.socket.try_send(message) {
                Ok(()) => {}
                Err(TrySendError::Full(message)) => {
                    self.waiting.push_front(message);
                    break;
                }
                Err(_) => return Err(Closed),
            }
        }
        Ok(())
    }

    fn note(&mut self, event: &MonitorEvent) {
        match event {
            MonitorEvent::HandshakeSucceeded { peer, .. } => {
                self.connected = true;
                let router = peer.peer_properties.socket_type == Some(SocketType::Router);
                self.news.push_back(FromServer::Connected { router });
            }
            MonitorEvent::Disconnected { reason, .. } if self.connected => {
                debug!(endpoint = %self.endpoint, ?reason, "receiver's connection ended");
                self.connected = false;
                self.news.push_back(FromServer::Lost);
            }
            MonitorEvent::ConnectDelayed { .. } if self.once && !self.connected => {
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

impl fmt::Debug for PlainDealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlainDealer")
            .field("endpoint", &self.endpoint.to_string())
            .field("connected", &self.connected)
            .finish_non_exhaustive()
    }
}
