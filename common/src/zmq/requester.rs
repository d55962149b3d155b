//! The connecting side of the init port.

use std::time::{Duration, Instant};

use bytes::Bytes;
use omq_tokio::{Message, MonitorEvent, MonitorRecvError, MonitorStream, Socket, SocketType};

use super::{CONNECT_GRACE, MAX_INIT_BYTES, endpoint, options};

/// A REQ socket for one init handshake.
#[derive(Debug)]
pub struct Requester {
    socket: Socket,
    monitor: MonitorStream,
    peer: String,
}

/// Reason why there was no reply.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// No process listens at the address, or the process does not speak ZeroMQ.
    #[error("no connection to {peer}: {cause}")]
    NoConnection {
        /// Address of the peer, `host:port`.
        peer: String,
        /// The last failure.
        cause: String,
    },
    /// The peer accepted the connection and ended it without an answer.
    #[error("{peer} ended the connection without an answer")]
    NoReply {
        /// Address of the peer, `host:port`.
        peer: String,
    },
}

impl Requester {
    /// Begins to connect.
    ///
    /// # Errors
    /// Fails if the host is not an address and cannot be resolved as a name.
    pub async fn connect(host: &str, port: u16) -> Result<Self, RequestError> {
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
    /// Not cancel safe: drop the requester after a cancelled request.
    pub async fn request(&mut self, payload: impl Into<Bytes>) -> Result<Bytes, RequestError> {
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
