//! The connecting side of the registration port.

use std::collections::VecDeque;

use bytes::Bytes;
use omq_tokio::{Message, Socket, SocketType, TrySendError};
use protocol::registration::PROXY_NAME;
use tracing::{debug, warn};

use super::keyed::{Dealer, Keyed, News, Protection};
use super::{Closed, MAX_REGISTRATION_BYTES, PUSH_LINGER, SendError, endpoint, options, rare};

/// The kind of proxy behind the registration port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// No proxy is connected.
    Nobody,
    /// Our proxy, which accepts registrations and makes call-backs.
    Proxy,
    /// LMCache's proxy, which knows only LMCache's messages.
    Lmcache,
}

/// A socket to the proxy's registration port: a PUSH socket, or a DEALER socket if the proxy proves a key. It reconnects
/// by itself.
#[derive(Debug)]
pub struct Push {
    kind: Kind,
    peer: String,
    dropped: u64,
    /// Messages of the proxy that nobody has taken yet; at most [`MAX_HEARD`].
    heard: VecDeque<Bytes>,
    /// True if the proxy that is connected has proved a key.
    is_keyed: bool,
}

#[derive(Debug)]
enum Kind {
    Plain(Socket),
    Keyed(Dealer, Listener),
}

impl Push {
    /// Begins to connect.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    pub async fn connect(host: &str, port: u16, protection: &Protection) -> Result<Self, Closed> {
        let kind = match protection {
            Protection::Plain => {
                let options = options(MAX_REGISTRATION_BYTES).linger(PUSH_LINGER);
                let socket = Socket::new(SocketType::Push, options);
                let there = endpoint(host, port);
                socket.connect(there).await.map_err(|_| Closed)?;
                Kind::Plain(socket)
            }
            Protection::Keyed(keyed) => Kind::Keyed(keyed_to(host, port, keyed), Listener::Nobody),
        };
        Ok(Self {
            kind,
            peer: format!("{host}:{port}"),
            dropped: 0,
            heard: VecDeque::new(),
            is_keyed: false,
        })
    }

    /// Queues a message and never waits. If the queue is full, because the proxy was not connected for a long time, the
    /// message is dropped and counted.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send(&mut self, payload: impl Into<Bytes>) -> Result<(), SendError> {
        self.note();
        let message = Message::single(payload.into());
        let sent = match &self.kind {
            Kind::Plain(socket) => socket.try_send(message).map_err(|error| match error {
                TrySendError::Full(_) => SendError::Full,
                _ => SendError::Gone,
            }),
            Kind::Keyed(dealer, _) => dealer.send(message),
        };
        if sent.is_err() {
            self.dropped += 1;
            if rare(self.dropped) {
                warn!(proxy = %self.peer, total = self.dropped,
                    "message to the proxy dropped: the proxy does not take messages");
            }
        }
        sent
    }

    /// Returns the kind of proxy that is connected now.
    pub async fn listener(&mut self) -> Listener {
        self.note();
        let socket = match &self.kind {
            Kind::Plain(socket) => socket,
            Kind::Keyed(_, listener) => return *listener,
        };
        let peers = socket.connections().await.unwrap_or_default();
        let Some(peer) = peers.iter().find_map(|peer| peer.peer_info.as_ref()) else {
            return Listener::Nobody;
        };
        match &peer.peer_identity {
            Some(name) if name == PROXY_NAME => Listener::Proxy,
            _ => Listener::Lmcache,
        }
    }

    /// Waits for the next message of the proxy. Only a proxy that has proved a key sends messages; for other proxies the
    /// future never completes.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn heard(&mut self) -> Bytes {
        loop {
            if let Some(message) = self.heard.pop_front() {
                return message;
            }
            let news = match &mut self.kind {
                Kind::Plain(_) => None,
                Kind::Keyed(dealer, _) => dealer.recv().await.ok(),
            };
            match news {
                Some(news) => self.take(news),
                // The socket's own task has ended, or there is no such proxy.
                None => return std::future::pending().await,
            }
        }
    }

    /// Sends queued messages for at most 1 s, then disconnects.
    pub async fn close(self) {
        match self.kind {
            Kind::Plain(socket) => {
                if let Err(error) = socket.close().await {
                    debug!(proxy = %self.peer, %error, "closing the connection");
                }
            }
            Kind::Keyed(dealer, _) => dealer.close(PUSH_LINGER).await,
        }
    }

    /// Notes the events of the connection. If nobody took the events, the connection's task would wait for room.
    fn note(&mut self) {
        while let Kind::Keyed(dealer, _) = &mut self.kind
            && let Some(news) = dealer.try_recv()
        {
            self.take(news);
        }
    }

    fn take(&mut self, news: News) {
        let Kind::Keyed(_, listener) = &mut self.kind else {
            return;
        };
        match news {
            News::Connected {
                identity, is_keyed, ..
            } => {
                self.is_keyed = is_keyed;
                *listener = match identity == PROXY_NAME {
                    true => Listener::Proxy,
                    false => Listener::Lmcache,
                };
            }
            News::Lost | News::Failed(_) | News::Slow => *listener = Listener::Nobody,
            // A peer without a key, which `prefer` permits, may be anybody.
            News::Message(_) if !self.is_keyed => {}
            News::Message(message) => {
                // Each message replaces what the messages before have said.
                if self.heard.len() == MAX_HEARD {
                    self.heard.pop_front();
                }
                self.heard.push_back(message);
            }
        }
    }
}

/// Largest number of messages of the proxy that wait.
const MAX_HEARD: usize = 128;

/// Begins to connect to a proxy that proves a key. A proxy without a key, where one is permitted, has a PULL socket.
fn keyed_to(host: &str, port: u16, keyed: &Keyed) -> Dealer {
    let keyed = keyed.clone();
    let plain = SocketType::Push;
    Dealer::connect(
        host,
        port,
        Bytes::new(),
        MAX_REGISTRATION_BYTES,
        keyed,
        plain,
    )
}
