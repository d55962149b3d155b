//! The ZeroMQ sockets of all programs: the only module that names the library.
//!
//! The library below can be exchanged. `common/tests/all` is the contract of this module: its tests speak the wire
//! protocol as plain bytes and name no library, so a library that passes them can replace the present one.
//!
//! Message sizes, handshakes, connections and the queues in both directions are bounded, because any process
//! that reaches the ports can connect. A send never waits: a peer that does not read loses its own messages
//! and delays no other peer. The sockets run on the caller's runtime.
//!
//! A [`Route`] is one *connection*, not one identity. A peer that reconnects under the same identity gets
//! another route, so that an answer never reaches another process that took over the identity.

mod dealer;
mod inbox;
mod push;
mod requester;
mod router;
mod traffic;

use std::time::Duration;

use bytes::Bytes;
use omq_tokio::endpoint::Host;
use omq_tokio::options::KeepAlive;
use omq_tokio::{Endpoint, Message, Options, ReconnectPolicy, Socket};
use tracing::warn;

pub use dealer::{DealerClient, FromServer};
pub use inbox::{Frame, Inbox};
pub use push::{Listener, Push};
pub use requester::{RequestError, Requester};
pub use router::{FromPeer, RouterServer};
pub use traffic::Traffic;

/// Longest message on an alloc port. A request of 4096 keys (a million tokens in chunks of 256) with
/// a model name of 100 characters has 600 KB.
pub const MAX_ALLOC_BYTES: usize = 1 << 20;
/// Longest message on an init port: a descriptor list of 170,000 slots with 24 bytes per slot.
pub const MAX_INIT_BYTES: usize = 4 << 20;
/// Longest message on the registration port.
pub const MAX_REGISTRATION_BYTES: usize = 64 << 10;
/// The socket's own task has ended, so no message will come any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ZeroMQ socket is closed")]
pub struct Closed;

/// The reason for which a message was not queued. The socket does not retry it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue to this peer is full, because the peer does not read.
    #[error("the peer does not read its messages")]
    Full,
    /// The connection has ended.
    #[error("the peer's connection has ended")]
    Gone,
}

/// A port that could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket listens there.
    #[error("{host}:{port} is taken by {holder}; choose another port")]
    InUse {
        /// The value as configured.
        host: String,
        /// The value as configured.
        port: u16,
        /// The process that listens there, or a text that it is not known.
        holder: String,
    },
    /// The bind failed for another reason: the host is not this machine's, the port is privileged, ….
    #[error("cannot listen on {host}:{port}: {cause}")]
    Refused {
        /// The value as configured.
        host: String,
        /// The value as configured.
        port: u16,
        /// The error of the kernel or of the resolver.
        cause: String,
    },
}
/// Returns the options that all sockets of this module share.
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
                holder: crate::socket_owner::holder(port)
                    .unwrap_or_else(|| "a process that the kernel does not name".to_owned()),
            })
        }
        Err(error) => Err(BindError::Refused {
            host: host.to_owned(),
            port,
            cause: error.to_string(),
        }),
    }
}

/// Returns a message with the frames of a REQ socket: an empty delimiter and the payload.
fn delimited(payload: Bytes) -> Message {
    Message::multipart([Bytes::new(), payload])
}

/// Returns the payload of an answer from a ROUTER or REP, with or without the empty delimiter. Absent if the
/// message has other frames.
fn payload(message: &Message) -> Option<Bytes> {
    match message.len() {
        1 => message.part_bytes(0),
        2 if message.part_slice(0) == Some(&[]) => message.part_bytes(1),
        frames => {
            warn!(frames, "message dropped: wrong number of frames");
            None
        }
    }
}

/// Returns true for 1, 2, 4, 8, …: a fault that a hostile peer can repeat is logged at these counts only.
fn rare(count: u64) -> bool {
    count.is_power_of_two()
}

/// Largest number of connections of one port. Each needs about 40 KB.
pub const MAX_PEERS: usize = 1024;
/// Handshakes of one port at the same time. With the library's default of 128, 500 silent connections locked
/// out every new peer in trials.
const MAX_PENDING_HANDSHAKES: usize = 2048;
/// Longest time for a new connection to finish ZeroMQ's handshake. Half-open connections end after it.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest time for sending queued messages when a socket closes. The library's default is 0, which drops
/// them.
const LINGER: Duration = Duration::from_millis(300);
const PUSH_LINGER: Duration = Duration::from_secs(1);
/// Messages queued to one peer.
pub const SEND_QUEUE: u32 = 256;
/// Messages queued from all peers of a port. They need at most 64 MiB on an alloc port.
const RECEIVE_QUEUE: u32 = 64;
/// Encoded bytes queued to one peer.
const SEND_BYTES: usize = 4 << 20;
/// Connection events queued. After an overflow the socket's whole table is read once.
const MONITOR_EVENTS: usize = 1024;
/// Time between two heartbeats. A peer that was stopped, or whose host vanished, counts as lost after
/// [`HEARTBEAT_TIMEOUT`]. A ZMTP 3.0 peer has no heartbeats; TCP's own probes find its vanished host after 25
/// s.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// Time after which a peer that answers no heartbeat counts as lost.
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(6);
const TCP_TIMEOUT: Duration = Duration::from_secs(10);
const RECONNECT_MIN: Duration = Duration::from_millis(20);
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// Time during which a refused connection is tried again, because the receiver may just be starting.
const CONNECT_GRACE: Duration = Duration::from_millis(500);
/// Largest number of messages that are delivered before a loss. A loss comes after the messages that were
/// received before it, and the bound keeps a flood of messages from hiding it.
const MESSAGES_BEFORE_LOST: usize = 2 * RECEIVE_QUEUE as usize;
