//! The proxy's registration port, and the port of P2P NCCL instances. Only peers that have proved a key get answers.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use omq_tokio::{Message, Options, Socket, SocketType};
use protocol::receiver::Route;

use super::keyed::{Protection, Router};
use super::{
    BindError, Closed, FromPeer, MAX_PEERS, MAX_REGISTRATION_BYTES, SendError, bind, options,
};
use crate::identity::Member;

/// A bound socket that receives messages. It can answer peers that have proved a key.
#[derive(Debug)]
pub struct Inbox {
    kind: Kind,
    address: SocketAddr,
}

#[derive(Debug)]
enum Kind {
    Plain(Socket),
    Keyed(Box<Router>),
}

/// A message from a peer.
#[derive(Debug)]
pub enum Frame {
    /// The frame of a message with only one frame. Every valid message on a PULL port has one
    /// frame.
    Single(Bytes),
    /// The last frame of a message with several frames. On a ROUTER port the frames before the last frame identify
    /// the peer.
    Last(Bytes),
    /// The only frame of a message from a peer that has proved a key, and the connection for [`Inbox::answer`].
    Of(Member, Route, Bytes),
    /// The message has no frame.
    Odd,
}

impl Inbox {
    /// Binds a PULL socket. `name` is the socket's identity, which tells a PUSH peer the kind of proxy; it may be
    /// empty. Port 0 takes any free port, which [`Inbox::address`] returns.
    ///
    /// # Errors
    /// See [`BindError`].
    pub async fn pull(
        name: &'static str,
        address: SocketAddr,
        protection: &Protection,
    ) -> Result<Self, BindError> {
        if let Protection::Keyed(keyed) = protection {
            let (host, plain) = (address.ip().to_string(), SocketType::Pull);
            let port = address.port();
            let router = Router::bind(
                &host,
                port,
                MAX_REGISTRATION_BYTES,
                keyed.clone(),
                plain,
                name,
            );
            let router = router.await?;
            return Ok(Self {
                address: SocketAddr::new(address.ip(), router.port()),
                kind: Kind::Keyed(Box::new(router)),
            });
        }
        let options = options(MAX_REGISTRATION_BYTES).identity(name);
        Self::bind_as(SocketType::Pull, options, address).await
    }

    /// Binds a ROUTER socket, for peers that are DEALERs.
    ///
    /// # Errors
    /// See [`BindError`].
    pub async fn router(address: SocketAddr) -> Result<Self, BindError> {
        Self::bind_as(SocketType::Router, options(MAX_REGISTRATION_BYTES), address).await
    }

    async fn bind_as(
        kind: SocketType,
        options: Options,
        address: SocketAddr,
    ) -> Result<Self, BindError> {
        let options = options.recv_hwm(INBOX_QUEUE).linger(Duration::ZERO);
        let socket = Socket::new(kind, options);
        let port = bind(&socket, &address.ip().to_string(), address.port()).await?;
        Ok(Self {
            kind: Kind::Plain(socket),
            address: SocketAddr::new(address.ip(), port),
        })
    }

    /// Returns the bound address, with the port that the system chose for port 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the next message of any peer.
    ///
    /// # Errors
    /// Fails only if the socket's own task has ended.
    ///
    /// # Cancel safety
    /// No message is lost when the future is dropped.
    pub async fn recv(&mut self) -> Result<Frame, Closed> {
        let router = match &mut self.kind {
            Kind::Plain(socket) => {
                let message = socket.recv().await.map_err(|_| Closed)?;
                return Ok(frame(&message));
            }
            Kind::Keyed(router) => router,
        };
        loop {
            if let FromPeer::Message(route, payload) = router.recv().await? {
                return Ok(match router.owner(route) {
                    Some(member) => Frame::Of(member.clone(), route, payload),
                    None => Frame::Single(payload),
                });
            }
        }
    }

    /// Queues an answer to a peer that has proved a key. Never waits.
    ///
    /// # Errors
    /// See [`SendError`]. Peers without a key, which have PUSH sockets, get no answers.
    pub fn answer(&mut self, route: Route, payload: impl Into<Bytes>) -> Result<(), SendError> {
        match &mut self.kind {
            Kind::Plain(_) => Err(SendError::Gone),
            Kind::Keyed(router) => router.send(route, payload.into()),
        }
    }

    /// If there are more than [`MAX_PEERS`] connections, disconnects the newest connections and returns their number.
    /// The oldest connections stay, so that a flood of new connections does not disconnect working sidecars.
    pub async fn shed(&self) -> usize {
        let Kind::Plain(socket) = &self.kind else {
            return 0; // the socket keeps its own limit
        };
        let Ok(mut peers) = socket.connections().await else {
            return 0;
        };
        if peers.len() <= MAX_PEERS {
            return 0;
        }
        peers.sort_by_key(|peer| peer.connection_id);
        let surplus = peers.split_off(MAX_PEERS);
        for peer in &surplus {
            // Disconnecting fails only if the peer has disconnected in the meantime.
            drop(socket.disconnect_peer(peer.connection_id).await);
        }
        surplus.len()
    }
}

fn frame(message: &Message) -> Frame {
    match (message.len(), message.part_bytes(0)) {
        (1, Some(bytes)) => Frame::Single(bytes),
        (parts, _) => match parts
            .checked_sub(1)
            .and_then(|last| message.part_bytes(last))
        {
            Some(bytes) => Frame::Last(bytes),
            None => Frame::Odd,
        },
    }
}

/// Maximum number of messages per peer that wait for the registry. If a peer sends more, TCP slows the peer down, and
/// this process does not need more memory.
const INBOX_QUEUE: u32 = 1024;
