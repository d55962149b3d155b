//! What the sender knows of one request, in one place.

use std::collections::BTreeSet;

use super::WatchId;
use crate::layout::chunk_span;
use crate::local::{Reserve, Target};
use crate::record::Record;
use crate::{EngineId, Epoch, LeaseId, Reason, SlotIndex, Time, TransferId};

/// One request of the prefill engine.
#[derive(Debug)]
pub(super) struct Request {
    /// Absent once the engine has been told of the end.
    pub(super) engine: Option<EngineId>,
    pub(super) to: Target,
    pub(super) keys: Vec<String>,
    pub(super) tokens: u32,
    /// Tokens that the engine's current step completes.
    pub(super) upto: u32,
    pub(super) overlap: bool,
    pub(super) phase: Phase,
    pub(super) chunks: Vec<Chunk>,
    /// Arrival number: whoever came first gets slots first.
    pub(super) order: u64,
    pub(super) since: Time,
    /// The last time at which anything moved.
    pub(super) progress: Time,
    /// Writes under way and since when.
    pub(super) in_flight: u32,
    pub(super) push_since: Time,
    /// When a write that had waited for its bytes last ended.
    pub(super) push_until: Time,
    pub(super) record: Record,
}

/// How far a request is with its receiver.
///
/// ```text
/// Linking ──Linked──▶ Asking ──AllocResponse──▶ Leased ──all Acked──▶ gone
///    │                  │                         │ cancelled, failed, unwanted
///    └──────────────────┼──▶ gone                 ▼
///              link lost│                      Closing ──no write under way, CancelNotif answered──▶ gone
///                       ▼                         ▲
///                  Withdrawing ──lease after all──┘
///                       └──refused──▶ gone
/// ```
#[derive(Debug)]
pub(super) enum Phase {
    /// The init handshake with the receiver is under way.
    Linking,
    /// The alloc request has no answer yet.
    Asking { seq: u64, sent: Time, first: Time },
    /// The link was lost before the answer: a lease may have been granted, and nobody else can tell the
    /// receiver that nothing is written under it. The question is repeated for that.
    Withdrawing(Told),
    /// The receiver lets us write.
    Leased(Lease),
    /// To an LMCache receiver.
    Feeding(Feeding),
    /// No write is posted any more; the receiver is told once the last one has ended.
    Closing {
        lease: Lease,
        reason: Reason,
        told: Option<Told>,
    },
}

/// What is special about a request to an LMCache receiver.
#[derive(Debug, Default)]
pub(super) struct Feeding {
    /// Since when a gathered chunk waits for its slot.
    pub(super) waits: Option<Time>,
    /// Nobody wants it any more: it ends when no write is under way.
    pub(super) over: bool,
    /// Chunks whose keys the receiver has a slot for.
    pub(super) known: BTreeSet<u32>,
    /// Those of them whose writes nobody knows the end of.
    pub(super) dirty: BTreeSet<u32>,
}

/// The receiver's permission.
#[derive(Clone, Debug)]
pub(super) struct Lease {
    pub(super) id: LeaseId,
    pub(super) epoch: Epoch,
    pub(super) have_tokens: u32,
    /// When the receiver last heard of us under this lease.
    pub(super) spoke: Time,
    /// Slots of writes whose end nobody knows.
    pub(super) dirty: Vec<u32>,
}

/// A cancel, or a question that is taken back, that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Told {
    pub(super) seq: u64,
    pub(super) sent: Time,
    pub(super) tries: u32,
}

/// One chunk of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// The decode side holds its tokens.
    Skipped,
    /// No slot at the receiver yet.
    Waiting,
    /// A slot at the receiver, none here.
    Remote { to: SlotIndex },
    /// The engine may fill the slot.
    Granted { from: SlotIndex, to: SlotIndex },
    /// The slot is complete.
    Staged { from: SlotIndex, to: SlotIndex },
    /// To an LMCache receiver: the engine may fill the slot.
    Filling { from: SlotIndex },
    /// To an LMCache receiver: complete once this watch says so.
    Gathering { from: SlotIndex, watch: WatchId },
    /// To an LMCache receiver: complete, its key has not been asked for.
    Full { from: SlotIndex },
    /// To an LMCache receiver: its key has been asked for.
    Asked { from: SlotIndex },
    /// A write is under way.
    Posted {
        from: SlotIndex,
        to: SlotIndex,
        transfer: TransferId,
    },
    /// Flushed at the receiver, which has not said yet that it knows.
    Done { to: SlotIndex, sum: Option<u64> },
    /// The receiver knows.
    Acked,
}

impl Chunk {
    /// The slot of the send buffer that this chunk holds.
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

    /// Nothing is left to write.
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

    /// The tokens that chunk `index` carries.
    pub(super) fn span(&self, index: usize, chunk_tokens: u32) -> (u32, u32) {
        let have = self.lease().map_or(0, |l| l.have_tokens);
        // `admit` bounds the number of chunks by the number of keys.
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        chunk_span(index, self.tokens, have, chunk_tokens)
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
