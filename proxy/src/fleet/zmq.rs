//! The registration ports: bounded ZeroMQ sockets. No other file of the proxy names ZeroMQ.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use omq_tokio::endpoint::Endpoint;
use omq_tokio::{Message, Options, Socket, SocketType};
use protocol::registration::PROXY_NAME;

/// A bound registration socket.
#[derive(Debug)]
pub(crate) struct Registrations {
    socket: Socket,
    address: SocketAddr,
    max_peers: usize,
}

/// A message from a peer.
#[derive(Debug)]
pub(crate) enum Frame {
    /// The only frame of a message, as every message on the PULL port has it.
    Single(Bytes),
    /// The last of several frames. On the ROUTER port the frames before it name the peer.
    Last(Bytes),
    /// The message has no frame.
    Odd,
}

/// The registration port cannot be used, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// The address could not be bound.
    #[error("cannot bind the registration port {address}: {text}")]
    Bind {
        /// The configured address.
        address: SocketAddr,
        /// Error text of the ZeroMQ library.
        text: String,
    },
    /// The socket has ended.
    #[error("the registration port is closed: {0}")]
    Closed(String),
}

impl Registrations {
    /// Binds the registration port of sidecars.
    ///
    /// # Errors
    /// The address is in use, does not belong to this host, or is not permitted.
    pub(crate) async fn bind(address: SocketAddr) -> Result<Self, PortError> {
        let named = Options::default().identity(PROXY_NAME);
        Self::bind_as(SocketType::Pull, named, address).await
    }

    /// Binds the port of P2P NCCL instances, which are DEALERs.
    ///
    /// # Errors
    /// The address is in use, does not belong to this host, or is not permitted.
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

    /// Returns the bound address, with the port that the system chose for port 0.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the next frame of any peer.
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

    /// Disconnects the newest connections beyond the limit and returns their number. The oldest stay, so
    /// that a flood of new connections does not push out sidecars in service.
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
            // Disconnecting fails only for a peer that has gone in the meantime.
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

/// The longest message in bytes: a `Register` with 64 ranks takes less than 2 KiB.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// Handshakes at once. With the library's default of 128, half-open connections starve newcomers.
const MAX_PENDING_HANDSHAKES: usize = 2048;

/// Time after which the socket drops a half-open connection.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// Heartbeat period. The socket drops a peer that misses three heartbeats; nothing else notices a host
/// that has vanished.
const HEARTBEAT: Duration = Duration::from_secs(2);

/// Messages per peer that may wait for the registry. TCP slows a flood beyond that, instead of the proxy
/// storing it.
const QUEUED_MESSAGES: u32 = 1024;

/// Most connections. A sidecar holds at most one per rank, so that 64 sidecars with 8 ranks fit twice.
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
