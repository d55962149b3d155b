//! Events, actions and configuration of a [`Sender`](super::Sender).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::keep::{ToFetcher, ToKeeper};
use crate::local::{
    Computing, Ended, Granted, Keep, LayersStaged, OfRequest, Reserve, Staged, Target,
};
use crate::message::{ToReceiver, ToSender};
use crate::record::Record;
use crate::{EngineId, Epoch, Layout, LeaseId, Reason, RequestId, SlotIndex, Time, TransferId};

/// Limits and timeouts of a [`Sender`](super::Sender).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// The sidecar's name.
    pub id: String,
    /// Epoch of this start of the sidecar.
    pub epoch: Epoch,
    /// Number of slots of the send buffer.
    pub slots: u32,
    /// Layout of one chunk.
    pub layout: Layout,
    /// Maximum number of requests in flight. The sender refuses further requests with `busy`.
    pub max_requests: usize,
    /// Time between two heartbeats under a lease. The sender asks for leases that last three times
    /// as long.
    pub heartbeat: Duration,
    /// Maximum time for which a receiver may hold an alloc request because slots are missing.
    pub wait: Duration,
    /// Maximum time for which a receiver may hold an alloc request because the decode request has
    /// not parked.
    pub park: Duration,
    /// Time after which the sender repeats a message that has not been answered.
    pub repeat: Duration,
    /// Maximum time for the handshake with a receiver.
    pub link: Duration,
    /// Maximum time without progress of a request. The sender then ends the request.
    pub stall: Duration,
    /// Maximum time for which KV is kept for a decode side after the KV is computed. The limit also
    /// holds if the engine asks for a longer time, and if the KV is renewed.
    #[serde(default)]
    pub max_keep: Duration,
    /// True if the sender must refuse every request with `push_off`. The tests use this flag to
    /// check that they fail if no KV is moved.
    pub push_off: bool,
}

/// Inputs of a [`Sender`](super::Sender).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// The prefill engine has begun a request.
    Reserve(EngineId, Reserve),
    /// The prefill engine has begun a request that names no receiver.
    Keep(EngineId, Keep),
    /// A message of a decode side's sidecar, on the fetch port.
    Fetcher {
        /// Connection that the message came from.
        from: FetcherId,
        /// The message.
        message: ToKeeper,
    },
    /// The prefill engine is about to complete tokens.
    Computing(EngineId, Computing),
    /// The prefill engine has gathered chunks.
    Staged(EngineId, Staged),
    /// The prefill engine cancels a request.
    Cancel(EngineId, OfRequest),
    /// The engine's connection ended.
    EngineGone(EngineId),
    /// The init handshake with a receiver has succeeded.
    Linked {
        /// The receiver.
        to: Target,
        /// The receiver's epoch; 0 for LMCache.
        epoch: Epoch,
        /// Protocol version; 0 for LMCache.
        v: u32,
        /// Number of the receiver's slots.
        slots: u32,
        /// Name of the transport that the handshake chose.
        transport: String,
        /// True for LMCache's asynchronous receiver, which frees keys on `CancelNotif`.
        #[serde(default)]
        cancels: bool,
    },
    /// The init handshake failed, or the connection is lost. Each write in flight still ends with
    /// its own [`Event::Done`] or [`Event::Failed`].
    LinkLost {
        /// The receiver.
        to: Target,
        /// Reason for the loss.
        reason: Reason,
    },
    /// A message of a receiver.
    Peer {
        /// The receiver.
        to: Target,
        /// The message.
        message: ToSender,
    },
    /// A write that waits for no event was posted, but did not end at once, and its transport may
    /// need the receiver's progress. Transports that never need the receiver's progress do not
    /// report this event.
    Lasting {
        /// The write.
        transfer: TransferId,
    },
    /// A write succeeded: the transport has flushed it at the receiver.
    Done {
        /// The write.
        transfer: TransferId,
        /// XXH3-64 of each chunk; empty if checksums are off.
        sums: Vec<u64>,
        /// Time at which the engine's event fired. Absent if the write waited for no event.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        began: Option<Time>,
    },
    /// A write failed.
    Failed {
        /// The write.
        transfer: TransferId,
        /// True if no byte of the write can still arrive. If false, the write's slots at the
        /// receiver are dirty.
        terminal: bool,
    },
    /// The answer to [`Action::Watch`].
    Watched {
        /// The watch.
        watch: WatchId,
        /// True if the chunks are complete in their slots; false if they will never be complete.
        stand: bool,
    },
    /// The time of [`Sender::deadline`](super::Sender::deadline) has passed.
    Deadline,
    /// The sender must refuse new requests from now on.
    Drain,
}

/// Outputs of a [`Sender`](super::Sender), to be carried out in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Make the init handshake with this receiver, even if there is a link already, then report
    /// [`Event::Linked`] or [`Event::LinkLost`].
    Link {
        /// The receiver.
        to: Target,
    },
    /// Send a message to a receiver.
    Send {
        /// The receiver.
        to: Target,
        /// The message.
        message: ToReceiver,
    },
    /// Send a message to a decode side's sidecar, on the fetch port.
    Answer {
        /// Connection of the decode side.
        to: FetcherId,
        /// The message.
        message: ToFetcher,
    },
    /// Post a write, then report [`Event::Done`] or [`Event::Failed`].
    Write {
        /// The receiver.
        to: Target,
        /// Id of the write.
        transfer: TransferId,
        /// Lease that permits the write; 0 for LMCache.
        lease: LeaseId,
        /// Source slot, target slot and length of each piece.
        pieces: Vec<Piece>,
        /// The transport must not read the send slots before this event has fired. Absent: the
        /// chunks are complete already.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<After>,
        /// Layers that the transport may read earlier: see
        /// [`Staged::layers`](crate::local::Staged::layers). The write ends when all layers and
        /// `after` are done.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        layers: Vec<LayersStaged>,
    },
    /// Wait for an event without posting a write, then report [`Event::Watched`].
    Watch {
        /// Id of the watch.
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
        /// Reason for the failure. Absent if every wanted chunk is written.
        reason: Option<Reason>,
        /// Bytes written.
        bytes: u64,
        /// Microseconds since the reservation.
        us: u64,
        /// Name of the transport; empty if the request ended before a transport was known.
        transport: String,
    },
    /// Log and count a request that has ended.
    Record(Record),
}

/// An event of an engine. When the event has fired, the chunks of a write are complete in their
/// slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct After {
    /// Engine that records the event.
    pub engine: EngineId,
    /// Position of the event in the list `events` of the engine's `Hello`.
    pub event: u32,
}

/// Return address of a decode side: one number per identity of the fetch socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FetcherId(pub u64);

/// Id of one wait for an event. Engines reuse their events, so the event's number does not identify
/// the wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WatchId(pub u64);

/// One chunk of a write, or a part of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Slot of the send buffer.
    pub from: SlotIndex,
    /// Slot of the landing buffer.
    pub to: SlotIndex,
    /// Offset of the piece in both slots, in bytes. The offset is 0 in all actions of the state
    /// machine.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl Granted {
    /// Returns a grant without chunks, which only gives the number of tokens that the decode side
    /// already has.
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

/// Use of the send buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gauges {
    /// Free slots.
    pub free: u32,
    /// Slots that are not free: an engine fills them, or a write reads them.
    pub held: u32,
    /// Requests in flight.
    pub requests: u32,
    /// Writes in flight.
    pub transfers: u32,
    /// Requests whose KV waits in the engine's blocks for a decode side.
    #[serde(default)]
    pub kept: u32,
    /// Tokens of these requests.
    #[serde(default)]
    pub kept_tokens: u64,
}
