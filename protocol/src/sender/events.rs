//! What goes into a [`Sender`](super::Sender) and what comes out.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::local::{Computing, Ended, Granted, LayersStaged, OfRequest, Reserve, Staged, Target};
use crate::message::{ToReceiver, ToSender};
use crate::record::Record;
use crate::{EngineId, Epoch, Layout, LeaseId, Reason, RequestId, SlotIndex, Time, TransferId};

/// Bounds and times of a [`Sender`](super::Sender).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The sidecar's name.
    pub id: String,
    /// This start's epoch.
    pub epoch: Epoch,
    /// Slots of the send buffer.
    pub slots: u32,
    /// What a chunk looks like.
    pub layout: Layout,
    /// Requests under way at once; beyond it `busy`.
    pub max_requests: usize,
    /// Time between two signs of life under a lease, as told to receivers times three.
    pub heartbeat: Duration,
    /// How long a receiver may hold an alloc request for room.
    pub wait: Duration,
    /// How long a receiver may hold an alloc request for the decode leg to park.
    pub park: Duration,
    /// After this time without an answer a message is repeated.
    pub repeat: Duration,
    /// How long a link to a new receiver may take.
    pub link: Duration,
    /// How long a request may go without progress.
    pub stall: Duration,
    /// Never push: for tests that must fail without a data plane.
    pub push_off: bool,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The prefill engine has begun a request.
    Reserve(EngineId, Reserve),
    /// The prefill engine is about to complete tokens.
    Computing(EngineId, Computing),
    /// The prefill engine has gathered chunks.
    Staged(EngineId, Staged),
    /// The prefill engine gives a request up.
    Cancel(EngineId, OfRequest),
    /// The engine's connection ended.
    EngineGone(EngineId),
    /// The init handshake with a receiver is done.
    Linked {
        /// The receiver.
        to: Target,
        /// Its epoch; 0 for LMCache.
        epoch: Epoch,
        /// Protocol version; 0 for LMCache.
        v: u32,
        /// Its slots.
        slots: u32,
        /// The wire that was chosen.
        transport: String,
        /// LMCache's asynchronous receiver, which takes keys back.
        #[serde(default)]
        cancels: bool,
    },
    /// The init handshake failed, or the link is gone. Writes under way report on their own.
    LinkLost {
        /// The receiver.
        to: Target,
        /// Why.
        reason: Reason,
    },
    /// A message of a receiver.
    Peer {
        /// The receiver.
        to: Target,
        /// The message.
        message: ToSender,
    },
    /// A write that waits for nothing did not end as soon as it was posted: its wire may need the
    /// receiver's help. Not said of wires that never do.
    Lasting {
        /// The write.
        transfer: TransferId,
    },
    /// A write ended well: flushed at the receiver.
    Done {
        /// The write.
        transfer: TransferId,
        /// XXH3-64 of each chunk, if sums are on.
        sums: Vec<u64>,
        /// When its bytes stood in their slots, if it had to wait for that.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        began: Option<Time>,
    },
    /// A write ended badly.
    Failed {
        /// The write.
        transfer: TransferId,
        /// No byte of it can still arrive. Otherwise its slots at the receiver are dirty.
        terminal: bool,
    },
    /// The answer to [`Action::Watch`].
    Watched {
        /// The watch.
        watch: WatchId,
        /// The bytes stand in their slots; else they never will.
        stand: bool,
    },
    /// [`Sender::deadline`](super::Sender::deadline) has passed.
    Deadline,
    /// No new requests from now on.
    Drain,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Make the init handshake with this receiver (anew, if there is a link), then say
    /// [`Event::Linked`] or [`Event::LinkLost`].
    Link {
        /// The receiver.
        to: Target,
    },
    /// Send to a receiver.
    Send {
        /// The receiver.
        to: Target,
        /// The message.
        message: ToReceiver,
    },
    /// Post a write, then say [`Event::Done`] or [`Event::Failed`].
    Write {
        /// The receiver.
        to: Target,
        /// Names the write.
        transfer: TransferId,
        /// The permission.
        lease: LeaseId,
        /// What goes where.
        pieces: Vec<Piece>,
        /// Nothing may be read before this.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<After>,
        /// What may be read earlier: see [`Staged::layers`](crate::local::Staged::layers). The whole is
        /// done when all of it is.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        layers: Vec<LayersStaged>,
    },
    /// Look at an event, without a write that waits for it, then say [`Event::Watched`].
    Watch {
        /// Names the watch.
        watch: WatchId,
        /// The event.
        after: After,
    },
    /// Tell the engine which slots it may fill.
    Granted(EngineId, Granted),
    /// Tell the engine that a request has ended.
    Ended(EngineId, Ended),
    /// Tell the proxy that a request has begun.
    Progress(RequestId),
    /// Tell the proxy how a request's transfer ended.
    Notify {
        /// The request.
        req: RequestId,
        /// Absent if every wanted chunk is written.
        reason: Option<Reason>,
        /// Bytes written.
        bytes: u64,
        /// From the reservation on, microseconds.
        us: u64,
        /// The wire.
        transport: String,
    },
    /// A request has ended.
    Record(Record),
}

/// An event of an engine, by which the bytes of a write stand in their slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct After {
    /// Whose event.
    pub engine: EngineId,
    /// Its position in the engine's hello.
    pub event: u32,
}

/// A look at an event, which engines use again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WatchId(pub u64);

/// One chunk of a write, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Slot of the send buffer.
    pub from: SlotIndex,
    /// Slot of the landing buffer.
    pub to: SlotIndex,
    /// Where it begins, in both slots: 0 in what the machine asks for.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub offset: u64,
    /// Bytes from there on.
    pub bytes: u64,
}

impl Granted {
    /// No chunk yet: only how much of the prompt the other side holds.
    pub(super) fn nothing(req: RequestId, have_tokens: u32) -> Self {
        Self {
            req,
            have_tokens,
            chunks: Vec::new(),
            slots: Vec::new(),
            layers: false,
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(offset: &u64) -> bool {
    *offset == 0
}

/// What the buffer holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gauges {
    /// Slots free.
    pub free: u32,
    /// Slots granted to an engine or being written from.
    pub held: u32,
    /// Requests under way.
    pub requests: u32,
    /// Writes under way.
    pub transfers: u32,
}
