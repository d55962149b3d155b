//! Moves bytes over TCP without any library, from the socket directly into the receiver's slots.
//!
//! Both ends are threads that make large calls on non-blocking sockets: one receiving thread per connection,
//! one sending thread per connection, and one listening thread. The runtime's thread only connects and posts.
//!
//! # The choice of system calls
//! The transport uses plain `send` and `recv` over two connections per link. The table compares the
//! alternatives. A small program measured each alternative over loopback, with one pair of processes per
//! stream. Other work ran on the same two cores, so compare only the ratios. The numbers are GB/s: the median
//! of 5 runs, each of which is the median of 8 transfers. One iperf3 stream reached 1.9 GB/s:
//!
//! | | 64 MiB, 1 stream | 512 MiB, 1 | 64 MiB, 2 | 512 MiB, 2 |
//! |---|---|---|---|---|
//! | `send` | 2.2 | 2.7 | 3.7 | 4.4 |
//! | `sendfile` of the memfd | 1.8 | 2.0 | 2.8 | 2.6 |
//! | `splice` through a pipe of 1 MiB | 1.7 | 1.9 | 2.9 | 2.7 |
//! | `MSG_ZEROCOPY` | 1.6 | 1.3 | 2.3 | 2.5 |
//!
//! `sendfile`, `splice` and `MSG_ZEROCOPY` save the sender's copy. But these calls need time for each page
//! (memfds have no huge pages by default), and wake the receiver for small pieces. On loopback, the kernel
//! copies the bytes even with `MSG_ZEROCOPY`. Socket buffers of a fixed size, instead of the size that the
//! kernel chooses, changed nothing. If the kernel wakes the receiver less often, the rate is a third higher
//! (6.0 GB/s at 512 MiB over 2 streams). So the receiver sets `SO_RCVLOWAT`, but never to more bytes than the
//! frame still has; otherwise the kernel would not wake the receiver for the last bytes.
//!
//! | file | |
//! |---|---|
//! | [`frame`] | the frames on the wire |
//! | [`address`] | the address of the data port |
//! | [`acceptor`] | listening, and the admission of connections |
//! | [`handshake`] | a connection before its hello |
//! | [`greeting`] | the same at the sender |
//! | [`seal`] | authentication and encryption of frames |
//! | [`pieces`] | the pieces of a part that have one tag |
//! | [`protected_reader`], [`protected_writer`] | receiving and sending pieces with tags |
//! | [`reader`] | receiving: from a connection into slots |
//! | [`slot_gate`] | the permission to write into a slot; the fence |
//! | [`link`] | sending: connecting, dividing writes |
//! | [`batch`] | one write as several jobs |
//! | [`connection_writer`] | sending over one connection; the outcome of a failed write |

use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use common::identity::Identity;
use futures::future::BoxFuture;
use protocol::message::Advert;
use protocol::{LeaseId, SlotIndex};

use super::expected_rate::ExpectedRate;
use super::protection::Protection;
use super::spec::{Spec, Start};
use super::{Kind, Link, LinkError, Remote, Transport};
use crate::memory::Buffer;

mod acceptor;
mod address;
mod batch;
mod connection_writer;
mod counts;
mod frame;
mod greeting;
mod handshake;
mod link;
mod pieces;
mod protected_reader;
mod protected_writer;
mod reader;
mod seal;
mod slot_gate;
mod socket;

use acceptor::Acceptor;
use greeting::Terms;
use handshake::Admission;
use link::TcpLink;
use reader::Receiver;

#[cfg(test)]
use frame::Refusal;

/// The built-in TCP transport.
pub(crate) const KIND: Kind = Kind(&Spec {
    name: "tcp",
    library: None,
    needs_gpu: false,
    uses_ucx: false,
    protects_data: true,
    lmcache_has_it: false,
    absence: None,
    start,
    address: address::of,
    expected_rate: |_| ExpectedRate::of_a_network(),
});

fn start(with: &Start<'_>) -> anyhow::Result<Arc<dyn Transport>> {
    let mut config = Config {
        connect: with.link,
        stall: with.stall,
        identity: with.identity.cloned(),
        protection: with.data,
        ..Config::default()
    };
    if let Some(data) = with.listen {
        let address = (data.host, data.port)
            .to_socket_addrs()?
            .next()
            .ok_or_else(|| anyhow::anyhow!("{} has no address", data.host))?;
        config.listen = Some(address);
        config.advertise = Some(data.advertise.to_owned());
    }
    let started = Tcp::bind(config, Arc::clone(with.buffer))
        .map_err(|e| anyhow::anyhow!("the data port of the built-in TCP transport: {e}"))?;
    Ok(Arc::new(started))
}

/// The limits and timeouts of the transport.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The address to listen on, with port 0 for any port; `None` if this process receives nothing.
    pub(crate) listen: Option<SocketAddr>,
    /// The host in the advert. If this field is `None`, the advert has the listening address. If the listening
    /// address is a wildcard (`0.0.0.0`), the advert has only the port, and peers use the host of the init
    /// port.
    pub(crate) advertise: Option<String>,
    /// The number of connections of a link. On two cores, two connections moved 1.6 times as much as one (4.5
    /// against 2.8 GB/s, measured before the receiver used `SO_RCVLOWAT`), because each end then uses both
    /// cores for its copies. Four connections were no faster than two.
    pub(crate) streams: usize,
    /// Maximum number of connections that are served at the same time, each by one thread.
    pub(crate) max_connections: usize,
    /// Time limit for making a link.
    pub(crate) connect: Duration,
    /// Time limit for the hello of a new connection, and for the rest of a frame's head once the head has
    /// begun.
    pub(crate) handshake: Duration,
    /// A write fails if it makes no progress for this time.
    pub(crate) stall: Duration,
    /// A silent connection is closed after this time, unless its lease is open.
    pub(crate) idle: Duration,
    /// The key of this process and the roster; `None` if no peer proves a key.
    pub(crate) identity: Option<Identity>,
    /// The weakest protection of the data of peers that prove a key.
    pub(crate) protection: Protection,
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
            identity: None,
            protection: Protection::Plain,
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
    /// Starts the transport. Listens if the configuration has a listening address.
    ///
    /// # Errors
    /// The kernel's refusal to bind the port or to start a thread.
    pub(crate) fn bind(config: Config, buffer: Arc<Buffer>) -> io::Result<Self> {
        let receiving = Arc::new(Receiver {
            buffer,
            gates: slot_gate::SlotGates::default(),
            counters: counts::Counters::default(),
            admission: Admission::new(config.identity.as_ref(), config.protection),
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

    /// Returns the listening address; `None` if this process receives nothing.
    pub(crate) fn address(&self) -> Option<SocketAddr> {
        self.listening.as_ref().map(|(address, _)| *address)
    }

    /// Returns the counts of the receiving half.
    #[cfg(test)]
    fn counts(&self) -> counts::Counts {
        self.receiving.counters.read()
    }
}

impl Transport for Tcp {
    fn kind(&self) -> Kind {
        KIND
    }

    fn advert(&self) -> Advert {
        let address = self.address().map(|address| match &self.config.advertise {
            // Peers add the host by which they know this process: see [`address`].
            None if address.ip().is_unspecified() => format!(":{}", address.port()),
            None => address.to_string(),
            Some(host) => address::join(host, address.port()),
        });
        Advert {
            kind: KIND.as_str().to_owned(),
            address: address.unwrap_or_default(),
        }
    }

    fn data_port(&self) -> Option<u16> {
        self.address().map(|address| address.port())
    }

    fn divide(&self, slots: u32, slot_bytes: u64) {
        self.receiving.gates.divide(slots, slot_bytes);
    }

    fn link(&self, remote: Remote) -> BoxFuture<'static, Result<Arc<dyn Link>, LinkError>> {
        let buffer = Arc::clone(&self.receiving.buffer);
        let terms = Terms {
            identity: self.config.identity.clone(),
            least: self.config.protection,
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

    fn open(&self, lease: LeaseId, owner: Option<&Arc<str>>, slot: SlotIndex) {
        self.receiving.gates.open(lease, owner, slot);
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
        // The receiving threads sleep in the kernel until bytes come.
    }
}

#[cfg(test)]
mod bench;
#[cfg(test)]
mod tests;
