//! The connecting side of the init port.

use std::time::{Duration, Instant};

use bytes::Bytes;
use omq_tokio::{Message, MonitorEvent, MonitorRecvError, MonitorStream, Socket, SocketType};

use super::keyed::{Dealer, News, Protection};
use super::{CONNECT_GRACE, MAX_INIT_BYTES, delimited, endpoint, options};

/// A REQ socket for one init handshake.
#[derive(Debug)]
pub struct Requester {
    kind: Kind,
    peer: String,
}

#[derive(Debug)]
enum Kind {
    Plain(Socket, MonitorStream),
    Keyed(Dealer),
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
    pub async fn connect(
        host: &str,
        port: u16,
        protection: &Protection,
    ) -> Result<Self, RequestError> {
        if let Protection::Keyed(keyed) = protection {
            let (keyed, plain) = (keyed.clone(), SocketType::Dealer);
            let dealer = Dealer::connect(host, port, Bytes::new(), MAX_INIT_BYTES, keyed, plain);
            return Ok(Self {
                kind: Kind::Keyed(dealer),
                peer: format!("{host}:{port}"),
            });
        }
        let socket = Socket::new(
            SocketType::Req,
            options(MAX_INIT_BYTES)
                .linger(Duration::ZERO)
                .handshake_timeout(SLOWEST_HANDSHAKE),
        );
        let monitor = socket.monitor();
        let peer = format!("{host}:{port}");
        match socket.connect(endpoint(host, port)).await {
            Ok(()) => Ok(Self {
                kind: Kind::Plain(socket, monitor),
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
        let no_reply = || RequestError::NoReply {
            peer: self.peer.clone(),
        };
        let (socket, monitor) = match &mut self.kind {
            Kind::Plain(socket, monitor) => (socket, monitor),
            Kind::Keyed(dealer) => return ask(dealer, &self.peer, payload.into(), began).await,
        };
        if socket.send(Message::single(payload.into())).await.is_err() {
            return Err(no_reply());
        }
        loop {
            tokio::select! {
                biased;
                reply = socket.recv() => {
                    let reply = reply.map_err(|_| no_reply())?;
                    return reply.part_bytes(reply.len().saturating_sub(1)).ok_or_else(no_reply);
                }
                event = monitor.recv() => match event {
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
                        return Err(no_reply());
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Limit of the handshake, longer than the deadline of any caller. The peer may get no core for some seconds; with a
/// shorter limit, this would cost a request whose deadline has not come.
const SLOWEST_HANDSHAKE: Duration = Duration::from_secs(3600);

/// Sends a request over a connection whose peer proves a key, and waits for the reply.
async fn ask(
    dealer: &mut Dealer,
    peer: &str,
    payload: Bytes,
    began: Instant,
) -> Result<Bytes, RequestError> {
    let no_reply = || RequestError::NoReply {
        peer: peer.to_owned(),
    };
    dealer.send(delimited(payload)).map_err(|_| no_reply())?;
    loop {
        match dealer.recv().await.map_err(|_| no_reply())? {
            News::Message(reply) => return Ok(reply),
            News::Lost => return Err(no_reply()),
            News::Failed(cause) if began.elapsed() >= CONNECT_GRACE => {
                return Err(RequestError::NoConnection {
                    peer: peer.to_owned(),
                    cause,
                });
            }
            News::Failed(_) | News::Slow | News::Connected { .. } => {}
        }
    }
}
