//! The connecting side of the registration port.

use bytes::Bytes;
use omq_tokio::{Message, Socket, SocketType, TrySendError};
use protocol::registration::PROXY_NAME;
use tracing::{debug, warn};

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

/// A PUSH socket to the proxy's registration port. It reconnects by itself.
#[derive(Debug)]
pub struct Push {
    socket: Socket,
    peer: String,
    dropped: u64,
}

impl Push {
    /// Begins to connect.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    pub async fn connect(host: &str, port: u16) -> Result<Self, Closed> {
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

    /// Queues a message and never waits. If the queue is full, because the proxy was not connected for a long time, the
    /// message is dropped and counted.
    ///
    /// # Errors
    /// See [`SendError`].
    pub fn send(&mut self, payload: impl Into<Bytes>) -> Result<(), SendError> {
        match self.socket.try_send(Message::single(payload.into())) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.dropped += 1;
                if rare(self.dropped) {
                    warn!(proxy = %self.peer, total = self.dropped,
                        "message to the proxy dropped: the proxy does not take messages");
                }
                Err(match error {
                    TrySendError::Full(_) => SendError::Full,
                    _ => SendError::Gone,
                })
            }
        }
    }

    /// Returns the kind of proxy that is connected now.
    pub async fn listener(&self) -> Listener {
        let peers = self.socket.connections().await.unwrap_or_default();
        let Some(peer) = peers.iter().find_map(|peer| peer.peer_info.as_ref()) else {
            return Listener::Nobody;
        };
        match &peer.peer_identity {
            Some(name) if name == PROXY_NAME => Listener::Proxy,
            _ => Listener::Lmcache,
        }
    }

    /// Sends queued messages for at most 1 s, then disconnects.
    pub async fn close(self) {
        if let Err(error) = self.socket.close().await {
            debug!(proxy = %self.peer, %error, "closing the connection");
        }
    }
}
