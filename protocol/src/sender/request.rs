//! State of one request at the sender.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{FetcherId, WatchId};
use crate::local::{Reserve, Target};
use crate::plan::{Chunking, Plan};
use crate::record::Record;
use crate::{EngineId, Epoch, LeaseId, Reason, SlotIndex, Time, Token, TransferId};

/// One request of the prefill engine.
#[derive(Debug)]
pub(super) struct Request {
    /// Engine that reserved the request. Absent: the sender has already told the engine that the request has ended.
    pub(super) engine: Option<EngineId>,
    pub(super) to: Target,
    pub(super) keys: Vec<String>,
    pub(super) tokens: u32,
    /// Number of leading tokens of the prompt that are computed when the engine's current step
    /// ends.
    pub(super) upto: u32,
    pub(super) overlap: bool,
    /// Fetch that this request serves; absent if the prefill request named its receiver, and after
    /// the request has ended.
    pub(super) fetched: Option<Fetched>,
    /// True if no proxy waits for a notification about this request.
    pub(super) unannounced: bool,
    pub(super) phase: Phase,
    pub(super) chunks: Vec<Chunk>,
    /// Arrival number: the sender gives slots to the oldest request first.
    pub(super) order: u64,
    pub(super) since: Time,
    /// Time of the last progress.
    pub(super) progress: Time,
    /// Number of writes in flight.
    pub(super) in_flight: u32,
    /// Time at which the sender last posted a write while no other write was in flight.
    pub(super) push_since: Time,
    /// Time of the most recent end of a write that had waited for an event.
    pub(super) push_until: Time,
    pub(super) record: Record,
}

/// Time for which KV is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Term {
    /// Time that each `Renew` gives.
    pub(super) keep: Duration,
    pub(super) deadline: Time,
    /// Latest possible deadline: a `Renew` moves the deadline at most to this time.
    pub(super) limit: Time,
}

/// Fetch that a request serves.
#[derive(Clone, Debug)]
pub(super) struct Fetched {
    pub(super) token: Token,
    pub(super) by: FetcherId,
    pub(super) term: Term,
}

/// Phase of a request at its receiver.
///
/// ```text
/// Linking ──Linked──▶ Asking ──AllocResponse──▶ Leased ──all Acked──▶ gone
///    │                  │                         │ cancelled, failed, unwanted
///    └──────────────────┼──▶ gone                 ▼
///              link lost│                      Closing ──no write in flight, CancelNotif answered──▶ gone
///                       ▼                         ▲
///                  Withdrawing ──lease after all──┘
///                       └──refused──▶ gone
/// ```
#[derive(Debug)]
pub(super) enum Phase {
    /// The init handshake with the receiver is in flight.
    Linking,
    /// The alloc request has no answer yet.
    Asking { seq: u64, sent: Time, first: Time },
    /// The connection was lost before the answer. The receiver may have granted a lease, and only
    /// this sender can tell the receiver that no write is in flight under the lease. So the sender
    /// repeats the alloc request.
    Withdrawing(Told),
    /// The receiver has granted a lease.
    Leased(Lease),
    /// The receiver is LMCache's.
    Feeding(Feeding),
    /// The sender posts no more writes. When the last write in flight has ended, the sender reports this to the
    /// receiver.
    Closing {
        lease: Lease,
        reason: Reason,
        told: Option<Told>,
    },
}

/// State of a request to an LMCache receiver.
#[derive(Debug, Default)]
pub(super) struct Feeding {
    /// Time since which a gathered chunk has waited for its slot. Absent: no chunk waits.
    pub(super) waits: Option<Time>,
    /// True if the request was cancelled or has failed. The request then ends when no write is in
    /// flight.
    pub(super) over: bool,
    /// Chunks whose keys have a slot at the receiver.
    pub(super) known: BTreeSet<u32>,
    /// Chunks in `known` whose write has an unknown end.
    pub(super) dirty: BTreeSet<u32>,
}

/// Permission of the receiver to write into its slots.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) id: LeaseId,
    pub(super) epoch: Epoch,
    pub(super) have_tokens: u32,
    /// Time of the last message to the receiver under this lease.
    pub(super) spoke: Time,
    /// Slots at the receiver in which a write with an unknown end may still arrive.
    pub(super) dirty: Vec<u32>,
}

/// State of a message that the sender repeats until it is answered: a cancel, or the alloc request
/// of a withdrawn request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told {
    pub(super) seq: u64,
    pub(super) sent: Time,
    pub(super) tries: u32,
}

/// One chunk of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// Nothing of this chunk has to move: the decode side already has its tokens, or needs none of
    /// them.
    Skipped,
    /// The receiver has granted no slot yet.
    Waiting,
    /// The chunk has a slot at the receiver but no send slot.
    Remote { to: SlotIndex },
    /// The engine may fill the slot.
    Granted { from: SlotIndex, to: SlotIndex },
    /// The engine has gathered the chunk into its send slot.
    Staged { from: SlotIndex, to: SlotIndex },
    /// With an LMCache receiver: the engine may fill the slot.
    Filling { from: SlotIndex },
    /// With an LMCache receiver: the chunk is complete when this watch reports success.
    Gathering { from: SlotIndex, watch: WatchId },
    /// With an LMCache receiver: the chunk is complete, and the sender has not yet asked for a slot
    /// for its key.
    Full { from: SlotIndex },
    /// With an LMCache receiver: the sender has asked for a slot for the chunk's key.
    Asked { from: SlotIndex },
    /// The chunk's write is in flight.
    Posted {
        from: SlotIndex,
        to: SlotIndex,
        transfer: TransferId,
    },
    /// The transport has flushed the chunk at the receiver. The receiver has not acknowledged the
    /// chunk.
    Done { to: SlotIndex, sum: Option<u64> },
    /// The receiver has acknowledged the chunk.
    Acked,
}

impl Chunk {
    /// Returns the send slot that this chunk holds; `None` if it holds none.
    pub(super) fn local(self) -> Option<SlotIndex> {
        match self {
            Self::Granted { from, .. }
            | Self::Staged { from, .. }
            | Self::Filling { from }
            | Self::Gathering { from, .. }
            | Self::Full { from }
            | Self::Asked { from }
            | Self::Posted { from, .. } => Some(from),
            _ => None,
        }
    }

    /// Returns true if nothing is left to write.
    pub(super) fn is_done(self) -> bool {
        matches!(self, Self::Skipped | Self::Done { .. } | Self::Acked)
    }
}

impl Request {
    pub(super) fn new(engine: EngineId, asked: Reserve, order: u64, now: Time) -> Self {
        Self {
            engine: Some(engine),
            chunks: vec![Chunk::Waiting; asked.keys.len()],
            record: Record {
                peer: format!("{}:{}", asked.to.host, asked.to.alloc_port),
                tokens: asked.tokens,
                ..Record::new(asked.req)
            },
            to: asked.to,
            keys: asked.keys,
            tokens: asked.tokens,
            upto: asked.upto,
            overlap: asked.overlap,
            fetched: None,
            unannounced: false,
            phase: Phase::Linking,
            order,
            since: now,
            progress: now,
            in_flight: 0,
            push_since: now,
            push_until: now,
        }
    }

    pub(super) fn lease(&self) -> Option<&Lease> {
        match &self.phase {
            Phase::Leased(lease) | Phase::Closing { lease, .. } => Some(lease),
            Phase::Linking | Phase::Asking { .. } | Phase::Withdrawing(_) | Phase::Feeding(_) => {
                None
            }
        }
    }

    pub(super) fn lease_mut(&mut self) -> Option<&mut Lease> {
        match &mut self.phase {
            Phase::Leased(lease) | Phase::Closing { lease, .. } => Some(lease),
            Phase::Linking | Phase::Asking { .. } | Phase::Withdrawing(_) | Phase::Feeding(_) => {
                None
            }
        }
    }

    /// Returns what each chunk carries.
    pub(super) fn plan<'a>(&self, chunking: &'a Chunking) -> Plan<'a> {
        let have = self.lease().map_or(0, |l| l.have_tokens);
        chunking.plan(self.tokens, have)
    }

    pub(super) fn is_done(&self) -> bool {
        self.chunks.iter().all(|c| c.is_done())
    }

    pub(super) fn is_acked(&self) -> bool {
        self.chunks
            .iter()
            .all(|c| matches!(c, Chunk::Skipped | Chunk::Acked))
    }
}
