//! The registration port: a bounded PULL socket. The only file of this binary that names ZeroMQ.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use omq_tokio::endpoint::Endpoint;
use omq_tokio::{Message, Options, Socket, SocketType};
use protocol::registration::PROXY_NAME;

/// The bound registration socket.
#[derive(Debug)]
pub(crate) struct Registrations {
    socket: Socket,
    address: SocketAddr,
    max_peers: usize,
}

/// What a peer sent.
#[derive(Debug)]
pub(crate) enum Frame {
    /// One frame, as every message on this port is.
    Single(Bytes),
    /// The last of several: the others say who has sent it.
    Last(Bytes),
    /// No frame.
    Odd,
}

/// The registration port cannot be used, or can no longer be.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The address could not be bound.
    #[error("cannot bind the registration port {address}: {text}")]
    Bind {
        /// The configured address.
        address: SocketAddr,
        /// What the library says.
        text: String,
    },
    /// The socket has ended.
    #[error("the registration port is closed: {0}")]
    Closed(String),
}

impl Registrations {
    /// Binds the port.
    ///
    /// # Errors
    /// The address is in use, not ours, or not permitted.
    pub(crate) async fn bind(address: SocketAddr) -> Result<Self, PortError> {
        let named = Options::default().identity(PROXY_NAME);
        Self::bind_as(SocketType::Pull, named, address).await
    }

    /// Binds the port of P2P NCCL instances, which are DEALERs.
    ///
    /// # Errors
    /// The address is in use, not ours, or not permitted.
    pub(crate) async fn bind_router(address: SocketAddr) -> Result<Self, PortError> {
        Self::bind_as(SocketType::Router, Options::default(), address).await
    }

    async fn bind_as(
        kind: SocketType,
        options: Options,
        address: SocketAddr,
    ) -> Result<Self, PortError> {
        let failed = |text: String| PortError::Bind { address, text };
        let options = options
            .max_message_size(MAX_MESSAGE_BYTES)
            .max_pending_handshakes(MAX_PENDING_HANDSHAKES)
            .handshake_timeout(HANDSHAKE_TIMEOUT)
            .heartbeat_interval(HEARTBEAT)
            .heartbeat_timeout(HEARTBEAT * 3)
            .recv_hwm(QUEUED_MESSAGES)
            .linger(Duration::ZERO);
        let socket = Socket::try_new(kind, options).map_err(|e| failed(e.to_string()))?;
        let bound = socket
            .bind(format!("tcp://{address}").as_str())
            .await
            .map_err(|e| failed(e.to_string()))?;
        let Endpoint::Tcp { port, .. } = bound else {
            return Err(failed(format!("bound to {bound} instead")));
        };
        Ok(Self {
            socket,
            address: SocketAddr::new(address.ip(), port),
            max_peers: MAX_PEERS,
        })
    }

    /// The bound address, with the port that was chosen for port 0.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next frame of any peer.
    ///
    /// # Errors
    /// The socket has ended; nothing more will come.
    ///
    /// # Cancel safety
    /// No frame is lost when the future is dropped.
    pub(crate) async fn recv(&self) -> Result<Frame, PortError> {
        let message = self
            .socket
            .recv()
            .await
            .map_err(|e| PortError::Closed(e.to_string()))?;
        Ok(single(&message))
    }

    /// Disconnects connections beyond the limit, newest first: sidecars that serve came early.
    /// Returns how many.
    pub(crate) async fn shed(&self) -> usize {
        let Ok(mut peers) = self.socket.connections().await else {
            return 0;
        };
        if peers.len() <= self.max_peers {
            return 0;
        }
        peers.sort_by_key(|peer| peer.connection_id);
        let surplus = peers.split_off(self.max_peers);
        for peer in &surplus {
            // Fails only for a peer that has gone meanwhile.
            drop(self.socket.disconnect_peer(peer.connection_id).await);
        }
        surplus.len()
    }
}

fn single(message: &Message) -> Frame {
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

/// A `Register` with 64 ranks takes under 2 KiB; an answer to nothing needs more.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// The library's default of 128 lets half-open connections starve newcomers.
const MAX_PENDING_HANDSHAKES: usize = 2048;

/// Half-open connections are dropped after this time.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// A peer that does not answer three of these is dropped; a vanished host is noticed by nothing else.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Messages that wait for the registry, per peer: a flood is slowed by TCP, not stored here.
const QUEUED_MESSAGES: u32 = 1024;

/// Each sidecar holds one connection for each of its ranks at most; 64 sidecars with 8 ranks fit
/// twice.
const MAX_PEERS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn the_newest_connections_are_shed() {
        let mut port = Registrations::bind(([127, 0, 0, 1], 0).into())
            .await
            .unwrap();
        port.max_peers = 2;
        let mut peers = Vec::new();
        for i in 0..4_usize {
            let peer = Socket::new(SocketType::Push, Options::default());
            let address = format!("tcp://{}", port.address());
            peer.connect(address.as_str()).await.unwrap();
            port.socket.wait_connected(i + 1, SOON).await.unwrap();
            peers.push(peer);
        }
        assert_eq!(port.shed().await, 2);
        for peer in &peers[..2] {
            peer.send(Message::single("still here")).await.unwrap();
            let frame = tokio::time::timeout(SOON, port.recv()).await.unwrap();
            assert!(matches!(frame, Ok(Frame::Single(_))));
        }
    }
}
