//! The ZeroMQ sockets of all programs. No other module uses the ZeroMQ library.
//!
//! The library can be exchanged. The tests in `common/tests/all` are the contract of this module. The tests speak the
//! wire protocol as plain bytes and do not depend on a library. So another library that passes these tests can replace
//! the present library.
//!
//! Message sizes, handshakes, connections and the queues in both directions are bounded, because any process that
//! reaches the ports can connect. A send never waits: if a peer does not read, messages to this peer are lost, but
//! messages to other peers are not delayed. The sockets run on the caller's runtime.
//!
//! A [`Route`] is one *connection*, not one identity. A peer that reconnects under the same identity gets another
//! route. So an answer never reaches another process that uses the identity later.

mod crowd;
mod dealer;
mod inbox;
mod keyed;
mod plain_dealer;
mod plain_router;
mod push;
mod requester;
mod router;
mod subscriber;
mod traffic;

use std::time::Duration;

use bytes::Bytes;
use omq_tokio::endpoint::Host;
use omq_tokio::options::KeepAlive;
use omq_tokio::{Endpoint, Message, Options, ReconnectPolicy, Socket};
use tracing::warn;

use crate::host::bare;

pub use dealer::{DealerClient, FromServer};
pub use inbox::{Frame, Inbox};
pub use keyed::{Keyed, Protection};
pub use push::{Listener, Push};
pub use requester::{RequestError, Requester};
pub use router::{FromPeer, RouterServer};
pub use subscriber::{MAX_EVENT_BYTES, Published, Replay, Subscriber};
pub use traffic::Traffic;

/// Maximum length of a message on an alloc port, in bytes. A request of 4096 keys (a million tokens
/// in chunks of 256) with a model name of 100 characters has 600 KB.
pub const MAX_ALLOC_BYTES: usize = 1 << 20;
/// Maximum length of a message on an init port, in bytes: a descriptor list of 170,000 slots with
/// 24 bytes per slot.
pub const MAX_INIT_BYTES: usize = 4 << 20;
/// Maximum length of a message on the registration port, in bytes.
pub const MAX_REGISTRATION_BYTES: usize = 64 << 10;
/// Error: the socket's own task has ended, so no message will come any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ZeroMQ socket is closed")]
pub struct Closed;

/// Reason why a message was not queued. The socket does not try to send the message again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue to this peer is full, because the peer does not read.
    #[error("the peer does not read its messages")]
    Full,
    /// The connection has ended.
    #[error("the peer's connection has ended")]
    Gone,
}

/// Error of a port that could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket listens on this port.
    #[error("{host}:{port} is taken by {holder}; choose another port")]
    InUse {
        /// The value as configured.
        host: String,
        /// The value as configured.
        port: u16,
        /// The process that listens on the port, or a text which says that the process is not known.
        holder: String,
    },
    /// The bind failed for another reason: the host is no address of this machine, the port is privileged, ….
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
    let bare = bare(host);
    let host = match (bare, bare.parse()) {
        ("*" | "", _) => Host::Wildcard,
        (_, Ok(ip)) => Host::Ip(ip),
        (name, Err(_)) => Host::Name(name.to_owned()),
    };
    Endpoint::Tcp { host, port }
}

/// Binds a TCP port for a socket of this module.
async fn bind_tcp(host: &str, port: u16) -> Result<tokio::net::TcpListener, BindError> {
    let bare = match bare(host) {
        "*" | "" => "0.0.0.0",
        bare => bare,
    };
    let bound = tokio::net::TcpListener::bind((bare, port)).await;
    bound.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => in_use(host, port),
        _ => BindError::Refused {
            host: host.to_owned(),
            port,
            cause: error.to_string(),
        },
    })
}

fn in_use(host: &str, port: u16) -> BindError {
    BindError::InUse {
        host: host.to_owned(),
        port,
        holder: crate::socket_owner::holder(port)
            .unwrap_or_else(|| "a process that the kernel does not name".to_owned()),
    }
}

async fn bind(socket: &Socket, host: &str, port: u16) -> Result<u16, BindError> {
    match socket.bind(endpoint(host, port)).await {
        Ok(Endpoint::Tcp { port, .. }) => Ok(port),
        Ok(_) => Ok(port),
        Err(omq_tokio::Error::Io(e)) if e.kind() == std::io::ErrorKind::AddrInUse => {
            Err(in_use(host, port))
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

/// Returns the payload of an answer from a ROUTER or REP, with or without the empty delimiter; `None` if the message
/// has other frames.
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

/// Returns an identity as text for logs.
fn printable(identity: &[u8]) -> String {
    String::from_utf8_lossy(identity)
        .chars()
        .map(|c| if c.is_control() { '.' } else { c })
        .collect()
}

/// Returns true for 1, 2, 4, 8, …. A fault that a hostile peer can repeat is logged only at these counts, so that it
/// cannot fill the log.
fn rare(count: u64) -> bool {
    count.is_power_of_two()
}

/// Largest number of connections of one port. Each connection needs about 40 KB.
pub const MAX_PEERS: usize = 1024;
/// Maximum number of handshakes of one port at the same time. With the library's default of 128, no new peer could
/// connect in trials with 500 silent connections.
const MAX_PENDING_HANDSHAKES: usize = 2048;
/// Maximum time for ZeroMQ's handshake on a new connection. After this time a half-open connection
/// ends.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum time for sending queued messages when a socket closes. The library's default is 0, which drops the messages.
const LINGER: Duration = Duration::from_millis(300);
const PUSH_LINGER: Duration = Duration::from_secs(1);
/// Maximum number of messages queued to one peer.
pub const SEND_QUEUE: u32 = 256;
/// Maximum number of received messages that are queued per port. These messages need at most 64 MiB on an alloc port.
const RECEIVE_QUEUE: u32 = 64;
/// Maximum number of encoded bytes queued to one peer.
const SEND_BYTES: usize = 4 << 20;
/// Maximum number of queued connection events. After an overflow, the port reads the socket's whole
/// table of connections once.
const MONITOR_EVENTS: usize = 1024;
/// Time between two heartbeats. If a peer's process was stopped or its host vanished, the peer counts as lost after
/// [`HEARTBEAT_TIMEOUT`]. A ZMTP 3.0 peer has no heartbeats; if the peer's host vanished, TCP's own probes end the
/// connection after 25 s.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// A peer that answers no heartbeat for this time counts as lost.
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(6);
const TCP_TIMEOUT: Duration = Duration::from_secs(10);
const RECONNECT_MIN: Duration = Duration::from_millis(20);
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// A refused connection is tried again for this time, because the receiver may be starting at this moment.
const CONNECT_GRACE: Duration = Duration::from_millis(500);
/// Maximum number of messages that are delivered before the loss of a connection is reported. The messages that came
/// before the loss are delivered first. Without this maximum, a flood of messages could delay the report for ever.
const MESSAGES_BEFORE_LOST: usize = 2 * RECEIVE_QUEUE as usize;
