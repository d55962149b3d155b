//! The sidecar's ZeroMQ sockets: the only module that names the library.
//!
//! Everything here is bounded, because the ports are open to whoever reaches them: message size,
//! handshakes, connections, queues in both directions. Sends never wait: a peer that does not read
//! costs its own messages and nobody's time. The sockets live on the caller's runtime.
//!
//! A [`Route`] is one *connection*, not one identity: a peer that comes back under the same identity
//! gets another route, so that an answer can never reach a stranger who took the name over.

mod dealer;
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

pub(crate) use dealer::{DealerClient, FromServer};
pub(crate) use push::{Listener, Push};
pub(crate) use requester::{RequestError, Requester};
pub(crate) use router::{FromPeer, RouterServer};
pub(crate) use traffic::Traffic;

/// Longest message on an alloc port. A request of 4096 keys (a million tokens in chunks of 256) with
/// a model name of 100 characters has 600 KB.
pub(crate) const MAX_ALLOC_BYTES: usize = 1 << 20;
/// Longest message on an init port: a descriptor list of 24 bytes a slot; 170,000 slots.
pub(crate) const MAX_INIT_BYTES: usize = 4 << 20;
/// Longest message on the registration port.
pub(crate) const MAX_REGISTRATION_BYTES: usize = 64 << 10;
/// The socket's own task is gone; nothing will come any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the ZeroMQ socket is closed")]
pub(crate) struct Closed;

/// Why a message was not taken. None of them waits or retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SendError {
    /// The queue to this peer is full: it does not read.
    #[error("the peer does not read its messages")]
    Full,
    /// The connection has ended.
    #[error("the peer's connection has ended")]
    Gone,
}

/// A port that could not be bound.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// Somebody else listens there.
    #[error("{host}:{port} is taken by {holder}")]
    InUse {
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
        /// The process, or that it is not known.
        holder: String,
    },
    /// The host is not this machine's, the port is privileged, ….
    #[error("cannot listen on {host}:{port}: {cause}")]
    Refused {
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
        /// The kernel's or resolver's word.
        cause: String,
    },
}
/// What every socket here has in common.
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
                holder: crate::net::socket_owner::holder(port)
                    .unwrap_or_else(|| "something that the kernel does not name".to_owned()),
            })
        }
        Err(error) => Err(BindError::Refused {
            host: host.to_owned(),
            port,
            cause: error.to_string(),
        }),
    }
}

/// REQ's frames around a payload.
fn delimited(payload: Bytes) -> Message {
    Message::multipart([Bytes::new(), payload])
}

/// The payload of a ROUTER's or REP's answer, with or without the empty delimiter.
fn payload(message: &Message) -> Option<Bytes> {
    match message.len() {
        1 => message.part_bytes(0),
        2 if message.part_slice(0) == Some(&[]) => message.part_bytes(1),
        frames => {
            warn!(frames, "message with wrong frames dropped");
            None
        }
    }
}

/// Logs of things that a hostile peer can repeat come at 1, 2, 4, 8, … of them.
fn rare(count: u64) -> bool {
    count.is_power_of_two()
}

/// Connections of one port. Each costs about 40 KB.
const MAX_PEERS: usize = 1024;
/// Below the library's default of 128, 500 silent connections starved every newcomer in trials.
const MAX_PENDING_HANDSHAKES: usize = 2048;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long queued messages are flushed at the end. The library's default is 0: it drops them.
const LINGER: Duration = Duration::from_millis(300);
const PUSH_LINGER: Duration = Duration::from_secs(1);
/// Messages queued to one peer.
const SEND_QUEUE: u32 = 256;
/// Messages queued from all peers of a port: at most 64 MiB on an alloc port.
const RECEIVE_QUEUE: u32 = 64;
/// Encoded bytes queued to one peer.
const SEND_BYTES: usize = 4 << 20;
/// Connection events queued. More only cost a look at the whole table.
const MONITOR_EVENTS: usize = 1024;
/// A peer whose host vanished or that was stopped is lost after [`HEARTBEAT_TIMEOUT`]; a ZMTP 3.0 peer
/// has no heartbeats, there TCP's own probes find a vanished host after 25 s.
const HEARTBEAT: Duration = Duration::from_secs(2);
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(6);
const TCP_TIMEOUT: Duration = Duration::from_secs(10);
const RECONNECT_MIN: Duration = Duration::from_millis(20);
const RECONNECT_MAX: Duration = Duration::from_secs(1);
/// A receiver that is just starting gets this long before a refused connection counts.
const CONNECT_GRACE: Duration = Duration::from_millis(500);
/// A loss waits for the messages that were received before it; the bound keeps a flood from hiding it.
const MESSAGES_BEFORE_LOST: usize = 2 * RECEIVE_QUEUE as usize;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::Pull;
