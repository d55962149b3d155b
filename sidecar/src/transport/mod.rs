//! Wires that carry chunks from a send buffer into a landing buffer, behind one trait.

use std::fmt;
use std::sync::Arc;

use futures::future::BoxFuture;
use protocol::message::Advert;
use protocol::sender::Piece;
use protocol::{LeaseId, SlotIndex};

pub(crate) mod choose;
pub(crate) mod cuda_ipc;
pub(crate) mod expected_rate;
pub(crate) mod nixl;
pub(crate) mod readiness;
pub(crate) mod set;
pub(crate) mod tcp;

pub(crate) use readiness::{Readiness, Ready};

/// Which wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// Copies into GPU memory of another process on the same host.
    CudaIpc,
    /// NIXL with its UCX backend: shared memory, RDMA, NVLink, TCP.
    Nixl,
    /// The built-in TCP transport.
    Tcp,
}

impl Kind {
    /// The name in configs, adverts, metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::CudaIpc => "cuda_ipc",
            Self::Nixl => "nixl",
            Self::Tcp => "tcp",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A receiver's landing buffer as the init handshake describes it.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    /// `host:init_port`, for logs and errors.
    pub(crate) name: String,
    /// NIXL agent metadata; empty if the peer has no NIXL.
    pub(crate) metadata: Vec<u8>,
    /// NIXL rows, one a slot; empty if the peer has no NIXL.
    pub(crate) rows: Vec<protocol::dlist::Row>,
    /// NIXL memory type of the rows.
    pub(crate) memory: protocol::dlist::Memory,
    /// Slots.
    pub(crate) slots: u32,
    /// Bytes of a slot.
    pub(crate) slot_bytes: u64,
    /// What the peer's advert of the chosen wire says; `host:port` of the built-in transport.
    pub(crate) address: Option<String>,
}

/// How a write ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// Flushed: every byte is visible at the receiver.
    Done,
    /// Failed.
    Failed {
        /// No byte of it can still arrive.
        terminal: bool,
        /// For the log.
        error: String,
    },
}

impl Outcome {
    /// Of both: the first error is told, and it is terminal only if every one is.
    pub(crate) fn and(self, other: Self) -> Self {
        match (self, other) {
            (
                Self::Failed { terminal, error },
                Self::Failed {
                    terminal: other, ..
                },
            ) => Self::Failed {
                terminal: terminal && other,
                error,
            },
            (failed @ Self::Failed { .. }, Self::Done) | (Self::Done, failed) => failed,
        }
    }
}

/// A wire of this process: both its sending and its receiving half.
pub(crate) trait Transport: Send + Sync + fmt::Debug {
    /// Which wire.
    fn kind(&self) -> Kind;
    /// What the init handshake says of it.
    fn advert(&self) -> Advert;
    /// NIXL agent metadata of this process; empty for other wires.
    fn metadata(&self) -> Vec<u8>;
    /// Sender: whether a receiver that advertises this wire can be reached by it; if not, why.
    /// `same_host`: it is on this host, where its process can be watched.
    fn reaches(&self, _advert: &Advert, _same_host: bool) -> Result<(), String> {
        Ok(())
    }
    /// Sender: why another wire to such a receiver is better, whichever it is.
    fn poor(&self, _same_host: bool) -> Option<String> {
        None
    }
    /// Tells the wire the slot layout of the buffer: slot `i` begins at `i * slot_bytes`. Every slot is closed.
    /// Before the first slot layout nothing is sent or received.
    fn divide(&self, _slots: u32, _slot_bytes: u64) {}
    /// NIXL's row of each slot; empty for other wires.
    fn rows(&self) -> Vec<protocol::dlist::Row> {
        Vec::new()
    }
    /// Sender: connects to a receiver's buffer. Bounded by its own timeout.
    fn link(&self, remote: Remote) -> BoxFuture<'static, Result<Arc<dyn Link>, LinkError>>;
    /// Receiver: writes under `lease` may land in `slot` from now on.
    fn open(&self, lease: LeaseId, slot: SlotIndex);
    /// Receiver: no new write may land in `slot`. Where this side does the writing (TCP), no byte
    /// lands in it after the call returns.
    fn close(&self, slot: SlotIndex);
    /// Whether [`Transport::close`] proves the slot free of writes (design D6).
    fn close_is_a_fence(&self) -> bool;
    /// What has happened on this wire since the start: a fixed set of names, for metrics.
    fn events(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
    /// Whether what does the work behind this wire lives; without it nothing moves any more.
    fn is_running(&self) -> bool {
        true
    }
    /// Receiver: writes are (or are no longer) announced, so the library must (need not) progress.
    fn expect(&self, writing: bool);
}

/// A sender's connection to one receiver over one wire. Dropping it disconnects once the writes under
/// way have ended.
pub(crate) trait Link: Send + Sync + fmt::Debug {
    /// Which wire.
    fn kind(&self) -> Kind;
    /// Writes slots of this process's send buffer, once they are ready, into slots of the receiver. The
    /// future may be dropped: the write still ends before its memory is given up.
    fn write_when(
        &self,
        ready: Ready,
        lease: LeaseId,
        pieces: Vec<Piece>,
    ) -> BoxFuture<'static, Outcome>;
    /// The same of slots that are ready.
    #[cfg(test)]
    fn write(&self, lease: LeaseId, pieces: Vec<Piece>) -> BoxFuture<'static, Outcome> {
        self.write_when(Ready::now(), lease, pieces)
    }
    /// Where in a slot a piece may begin: at multiples of this.
    fn granule(&self) -> u64 {
        1
    }
    /// What the library says it uses underneath, for people; empty if it does not say.
    fn reported(&self) -> String;
    /// A part of it is gone, so that writes would fail: it has to be made anew.
    fn is_broken(&self) -> bool {
        false
    }
}

/// A link that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("no {kind} link to {peer}: {cause}")]
pub(crate) struct LinkError {
    /// Which wire.
    pub(crate) kind: Kind,
    /// `host:init_port`.
    pub(crate) peer: String,
    /// What failed, and what to check.
    pub(crate) cause: String,
}
