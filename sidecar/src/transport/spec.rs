//! Defines the facts that each transport states about itself in its folder.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use common::identity::Identity;
use protocol::message::Advert;

use super::Transport;
use super::expected_rate::{Ends, ExpectedRate};
use super::protection::Protection;
use crate::memory::Buffer;

/// The facts about a transport that the rest of the process needs. Each transport's folder defines its
/// `Spec`.
#[derive(Debug)]
pub(crate) struct Spec {
    /// The name in configurations, adverts, metrics and logs.
    pub(super) name: &'static str,
    /// Loads the library that the transport needs, and returns its version and place. `None` if the transport is built in.
    pub(super) library: Option<Library>,
    /// True if the transport serves buffers in GPU memory only.
    pub(super) needs_gpu: bool,
    /// True if the transport loads UCX, so that UCX's TCP ports need the user's consent.
    pub(super) uses_ucx: bool,
    /// True if keys can protect the transport's data on the wire (`sidecar.data`).
    pub(super) protects_data: bool,
    /// True if LMCache's peers, which advertise nothing, have the transport.
    pub(super) lmcache_has_it: bool,
    /// The log text if the transport does not start and the configuration does not name it. `None` if a failed
    /// start stops the process.
    pub(super) absence: Option<&'static str>,
    /// Starts the transport over one buffer.
    pub(super) start: fn(&Start<'_>) -> anyhow::Result<Arc<dyn Transport>>,
    /// Returns the address to link to, from the receiver's advert and from the host under which this process
    /// reached the receiver. `Ok(None)`: the transport needs no address.
    pub(super) address: fn(&Advert, &str) -> Result<Option<String>, NoAddress>,
    /// Returns the minimum rate to expect from a link between these ends.
    pub(super) expected_rate: fn(Ends) -> ExpectedRate,
}

/// Loads a library and describes it; the error says why it cannot be loaded.
type Library = fn() -> Result<String, String>;

/// The buffer and the settings with which a transport starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start<'a> {
    /// The buffer to send from or to receive into.
    pub(crate) buffer: &'a Arc<Buffer>,
    /// The tensor-parallel rank of the buffer.
    pub(crate) rank: u32,
    /// The name of the sidecar and its rank, for peers and logs.
    pub(crate) id: &'a str,
    /// Time limit for making a link.
    pub(crate) link: Duration,
    /// A write fails if it makes no progress for this time.
    pub(crate) stall: Duration,
    /// The key of this process and the roster; `None` if no peer proves a key.
    pub(crate) identity: Option<&'a Identity>,
    /// The weakest protection of the data of peers that prove a key, for the wires that can protect it.
    pub(crate) data: Protection,
    /// The port for data; `None` if this side receives nothing.
    pub(crate) listen: Option<DataPort<'a>>,
}

/// The port on which a transport may listen for data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DataPort<'a> {
    /// The host to bind.
    pub(crate) host: &'a str,
    /// The host under which peers reach the port.
    pub(crate) advertise: &'a str,
    /// The port; 0 means any free port.
    pub(crate) port: u16,
}

/// The reason why an advert gives no address to link to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoAddress {
    /// The peer's transport does not receive.
    Absent,
    /// The text is not a `host:port`.
    Invalid,
}

/// The kind of a transport: an entry of the table of transports.
#[derive(Clone, Copy)]
pub(crate) struct Kind(pub(super) &'static Spec);

impl Kind {
    /// Returns the name in configurations, adverts, metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        self.0.name
    }

    /// Returns true if the transport serves buffers in GPU memory only.
    pub(crate) fn needs_gpu(self) -> bool {
        self.0.needs_gpu
    }

    /// Returns true if the transport loads UCX.
    pub(crate) fn uses_ucx(self) -> bool {
        self.0.uses_ucx
    }

    /// Loads the transport's library. Returns its version and place; `None` if the transport is built in.
    ///
    /// # Errors
    /// The places that were tried.
    pub(crate) fn library(self) -> Option<Result<String, String>> {
        self.0.library.map(|load| load())
    }

    /// Returns the address in a receiver's advert; `None` if the transport needs no address, or the advert has none.
    pub(crate) fn address(self, advert: &Advert, host: &str) -> Option<String> {
        (self.0.address)(advert, host).ok().flatten()
    }

    /// Returns true if keys can protect the transport's data on the wire.
    pub(crate) fn protects_data(self) -> bool {
        self.0.protects_data
    }

    /// Returns true if the sidecar also starts on a host that lacks the transport.
    pub(crate) fn is_optional(self) -> bool {
        self.0.absence.is_some()
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl Eq for Kind {}

impl Hash for Kind {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.name.hash(state);
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kind({})", self.0.name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
