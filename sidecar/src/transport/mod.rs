//! Defines the wires that carry chunks from a send buffer into a receiver's buffer, behind one trait.

use std::fmt;
use std::sync::Arc;

use futures::future::BoxFuture;
use protocol::message::Advert;
use protocol::sender::Piece;
use protocol::{LeaseId, SlotIndex};

pub(crate) mod choose;
pub(crate) mod cuda_ipc;
pub(crate) mod environment;
pub(crate) mod expected_rate;
pub(crate) mod nixl;
pub(crate) mod protection;
pub(crate) mod rdma;
pub(crate) mod readiness;
pub(crate) mod set;
pub(crate) mod spec;
pub(crate) mod table;
pub(crate) mod tcp;
pub(crate) mod ucx;

pub(crate) use readiness::{Readiness, Ready};
pub(crate) use spec::Kind;

/// A receiver's buffer as the init handshake describes it.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    /// `host:init_port`, for logs and errors.
    pub(crate) name: String,
    /// The name that the receiver's hello gives, with its rank, if the receiver has proved that name's key; else `None`.
    pub(crate) id: Option<String>,
    /// The handshake's fields that only one transport fills.
    pub(crate) fields: HandshakeFields,
    /// The kind of memory of the buffer.
    pub(crate) memory: protocol::dlist::Memory,
    /// The number of slots.
    pub(crate) slots: u32,
    /// Bytes of a slot.
    pub(crate) slot_bytes: u64,
    /// The address in the peer's advert of the chosen wire; `None` if the wire needs no address.
    pub(crate) address: Option<String>,
}

/// The fields that LMCache's own handshake messages have; a sidecar's fields come after these fields. At most
/// one transport of a process fills LMCache's fields, and only the same transport of the peer reads them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct HandshakeFields {
    /// The transport's description of this process; empty if no transport has one.
    pub(crate) metadata: Vec<u8>,
    /// The memory range of each slot; empty before the first slot layout, and if no transport fills this field.
    pub(crate) rows: Vec<protocol::dlist::Row>,
}

/// The result of a write.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// The write was flushed: every byte is visible at the receiver.
    Done,
    /// The write failed, perhaps after some of its bytes had arrived.
    Failed {
        /// True if no byte of the write can still arrive.
        terminal: bool,
        /// The error for the log.
        error: String,
    },
}

impl Outcome {
    /// Combines the outcomes of two parts of a write. If both parts failed, the result has the first part's
    /// error, and is terminal only if both failures are terminal.
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

/// A wire of this process: its sending and its receiving half.
pub(crate) trait Transport: Send + Sync + fmt::Debug {
    /// Returns the kind of the wire.
    fn kind(&self) -> Kind;
    /// Returns the wire's advert for the init handshake.
    fn advert(&self) -> Advert;
    /// Returns the handshake's fields for LMCache's peers, if this wire fills them.
    fn handshake_fields(&self) -> Option<HandshakeFields> {
        None
    }
    /// Returns the port on which the wire listens for data; `None` if it does not listen.
    fn data_port(&self) -> Option<u16> {
        None
    }
    /// Sender: checks that the wire reaches a receiver that advertises it; the error says why it does not.
    /// `same_host` is true if the receiver is on this host and its process can be watched.
    fn reaches(&self, _advert: &Advert, _same_host: bool) -> Result<(), String> {
        Ok(())
    }
    /// Sender: returns the reason to use this wire only if no other wire reaches the receiver; `None` if this
    /// wire is a normal choice.
    fn poor(&self, _same_host: bool) -> Option<String> {
        None
    }
    /// Tells the wire the slot layout of the buffer: slot `i` begins at `i * slot_bytes`. All slots are then
    /// closed. Before the first slot layout, nothing is sent or received.
    fn divide(&self, _slots: u32, _slot_bytes: u64) {}
    /// Sender: connects to a receiver's buffer. The wire's own timeout limits the duration of the call.
    fn link(&self, remote: Remote) -> BoxFuture<'static, Result<Arc<dyn Link>, LinkError>>;
    /// Receiver: lets writes under `lease` land in `slot` from now on. A wire whose connections prove keys admits only
    /// writes of the principal `owner`; `None` means that the lease has no principal.
    fn open(&self, lease: LeaseId, owner: Option<&Arc<str>>, slot: SlotIndex);
    /// Receiver: lets no new write begin in `slot`. If this process itself writes the received bytes into the
    /// slot (TCP), no byte lands in the slot after the call returns.
    fn close(&self, slot: SlotIndex);
    /// Returns true if [`Transport::close`] proves that no write can reach the slot any more (design D6).
    fn close_is_a_fence(&self) -> bool;
    /// Returns the counts of the wire's events since the start, for metrics. The set of names is fixed.
    fn events(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
    /// Returns true while the wire's thread runs. Without the thread, the wire moves no bytes.
    fn is_running(&self) -> bool {
        true
    }
    /// Receiver: tells the wire whether writes are announced. While writes are announced, the wire's library
    /// must make progress.
    fn expect(&self, writing: bool);
}

/// A sender's connection to one receiver over one wire. When the link is dropped, it disconnects once the
/// writes in flight have ended.
pub(crate) trait Link: Send + Sync + fmt::Debug {
    /// Returns the kind of the wire.
    fn kind(&self) -> Kind;
    /// Writes slots of this process's send buffer, once they are ready, into slots of the receiver. If the
    /// future is dropped, the write still ends before its memory is freed.
    fn write_when(
        &self,
        ready: Ready,
        lease: LeaseId,
        pieces: Vec<Piece>,
    ) -> BoxFuture<'static, Outcome>;
    /// Writes slots that are ready.
    #[cfg(test)]
    fn write(&self, lease: LeaseId, pieces: Vec<Piece>) -> BoxFuture<'static, Outcome> {
        self.write_when(Ready::now(), lease, pieces)
    }
    /// Returns the granule: a piece may begin only at multiples of this many bytes in a slot.
    fn granule(&self) -> u64 {
        1
    }
    /// Returns the library's own report about its connection, for people; empty if there is none.
    fn reported(&self) -> String;
    /// Returns true if a part of the link is broken, so that writes would fail. The link must then be made
    /// again.
    fn is_broken(&self) -> bool {
        false
    }
}

/// The reason why a link could not be made.
#[derive(Debug, thiserror::Error)]
#[error("no {kind} link to {peer}: {cause}")]
pub(crate) struct LinkError {
    /// The kind of the wire.
    pub(crate) kind: Kind,
    /// The receiver, as `host:init_port`.
    pub(crate) peer: String,
    /// The failure, and what to check.
    pub(crate) cause: String,
}
