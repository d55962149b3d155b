//! The built-in TCP transport: pure Rust, no library, straight into the landing slots.
//!
//! Both ends are threads that make large calls on non-blocking sockets: a receiving thread for each
//! connection, a sending thread for each connection, one listening thread. The runtime's thread only
//! connects and posts.
//!
//! # How the bytes are moved
//! By plain `send` and `recv`, over two connections a link. Measured with a bare program for each
//! way, a pair of processes for each stream, over loopback on two cores shared with other work (so
//! read them as ratios): GB/s, median of 5 runs, each the median of 8 transfers, beside one iperf3
//! stream at 1.9:
//!
//! | | 64 MiB, 1 stream | 512 MiB, 1 | 64 MiB, 2 | 512 MiB, 2 |
//! |---|---|---|---|---|
//! | `send` | 2.2 | 2.7 | 3.7 | 4.4 |
//! | `sendfile` of the memfd | 1.8 | 2.0 | 2.8 | 2.6 |
//! | `splice` through a pipe of 1 MiB | 1.7 | 1.9 | 2.9 | 2.7 |
//! | `MSG_ZEROCOPY` | 1.6 | 1.3 | 2.3 | 2.5 |
//!
//! The three that save the sender's copy pay for it page by page (there are no huge pages in memfds
//! by default), and give the receiver small pieces to wake up for; `MSG_ZEROCOPY` is copied after
//! all on loopback. Fixed socket buffers instead of the kernel's own tuning changed nothing. What
//! gives a third more (6.0 at 512 MiB over 2 streams) is to wake the receiver less often: it sets
//! `SO_RCVLOWAT`, to no more than the frame has left, because the kernel wakes nobody for less.
//!
//! | file | |
//! |---|---|
//! | [`frame`] | what is said on the wire |
//! | [`acceptor`] | listening: who may connect |
//! | [`handshake`] | a connection before its hello |
//! | [`reader`] | receiving: from a connection into slots |
//! | [`slot_gate`] | which lease may write where; the fence |
//! | [`link`] | sending: connecting, dividing writes |
//! | [`batch`] | one write as several jobs |
//! | [`connection_writer`] | sending: one connection; what a failure may claim |

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use protocol::message::Advert;
use protocol::{LeaseId, SlotIndex};

use super::{Kind, Link, LinkError, Remote, Transport};
use crate::memory::Buffer;

mod acceptor;
mod batch;
mod connection_writer;
mod counts;
mod frame;
mod handshake;
mod link;
mod reader;
mod slot_gate;
mod socket;

use acceptor::Acceptor;
use link::{TcpLink, Terms};
use reader::Receiver;

#[cfg(test)]
use frame::Refusal;

/// Bounds and times.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Where to listen, port 0 for any; `None` if nothing is to be received.
    pub(crate) listen: Option<SocketAddr>,
    /// The host that peers are told; `None` for the address that is listened on, or, if that is any
    /// address, for the one that they know the init port by.
    pub(crate) advertise: Option<String>,
    /// Connections of a link. On two cores two moved 1.6 times what one did (4.5 against 2.8 GB/s,
    /// before the receiver was woken less often), because each end then copies on both cores; four
    /// moved no more.
    pub(crate) streams: usize,
    /// Connections that may be served at once, each by a thread.
    pub(crate) max_connections: usize,
    /// Time to make a link.
    pub(crate) connect: Duration,
    /// Time for a stranger's hello, and for a frame's head once it has begun.
    pub(crate) handshake: Duration,
    /// Time that a write may stand still.
    pub(crate) stall: Duration,
    /// Time that a connection may be silent while it shows no lease that is open.
    pub(crate) idle: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: None,
            advertise: None,
            streams: 2,
            max_connections: 256,
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(5),
            stall: Duration::from_secs(10),
            idle: Duration::from_secs(600),
        }
    }
}

/// Both halves of the transport over one buffer.
#[derive(Debug)]
pub(crate) struct Tcp {
    config: Config,
    receiving: Arc<Receiver>,
    listening: Option<(SocketAddr, Acceptor)>,
}

impl Tcp {
    /// Listens, if it is to.
    ///
    /// # Errors
    /// The kernel's refusal to bind or to give a thread.
    pub(crate) fn bind(config: Config, buffer: Arc<Buffer>) -> io::Result<Self> {
        let receiving = Arc::new(Receiver {
            buffer,
            gates: slot_gate::SlotGates::default(),
            counters: counts::Counters::default(),
            handshake: config.handshake,
            stall: config.stall,
            idle: config.idle,
        });
        let listening = match config.listen {
            None => None,
            Some(address) => {
                let listener = TcpListener::bind(address)?;
                let address = listener.local_addr()?;
                let acceptor =
                    Acceptor::start(listener, Arc::clone(&receiving), config.max_connections)?;
                Some((address, acceptor))
            }
        };
        Ok(Self {
            config,
            receiving,
            listening,
        })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.listening.as_ref().map(|(address, _)| *address)
    }

    /// What the receiving half has seen.
    #[cfg(test)]
    fn counts(&self) -> counts::Counts {
        self.receiving.counters.read()
    }
}

impl Transport for Tcp {
    fn kind(&self) -> Kind {
        Kind::Tcp
    }

    fn advert(&self) -> Advert {
        let address = self.address().map(|address| match &self.config.advertise {
            // Peers put the host that they know us by in front: see `choose`.
            None if address.ip().is_unspecified() => format!(":{}", address.port()),
            None => address.to_string(),
            Some(host) => super::choose::join(host, address.port()),
        });
        Advert {
            kind: Kind::Tcp.as_str().to_owned(),
            address: address.unwrap_or_default(),
        }
    }

    fn metadata(&self) -> Vec<u8> {
        Vec::new()
    }

    fn divide(&self, slots: u32, slot_bytes: u64) {
        self.receiving.gates.divide(slots, slot_bytes);
    }

    fn link(&self, remote: Remote) -> BoxFuture<'static, Result<Arc<dyn Link>, LinkError>> {
        let buffer = Arc::clone(&self.receiving.buffer);
        let terms = Terms {
            streams: self.config.streams,
            connect: self.config.connect,
            stall: self.config.stall,
            slot_bytes: self.receiving.gates.current().slot_bytes(),
        };
        Box::pin(async move {
            let link = TcpLink::connect(buffer, remote, terms).await?;
            Ok(Arc::new(link) as Arc<dyn Link>)
        })
    }

    fn open(&self, lease: LeaseId, slot: SlotIndex) {
        self.receiving.gates.open(lease, slot);
    }

    fn close(&self, slot: SlotIndex) {
        self.receiving.gates.close(slot);
    }

    fn close_is_a_fence(&self) -> bool {
        true
    }

    fn events(&self) -> Vec<(&'static str, u64)> {
        self.receiving.counters.read().named()
    }

    fn expect(&self, _writing: bool) {
        // The receiving threads sleep in the kernel until something comes.
    }
}

#[cfg(test)]
mod bench;
#[cfg(test)]
mod tests;
