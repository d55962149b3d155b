//! What the receiver knows of one request, in one place.

use std::time::Duration;

use super::ended::Heard;
use super::{Route, SenderId};
use crate::layout::chunk_span;
use crate::message::{AllocRequest, AllocX};
use crate::record::Record;
use crate::{EngineId, LeaseId, Reason, RequestId, SlotIndex, Time};

/// One request: what the decode side said, and what the sender side said.
#[derive(Debug)]
pub(super) struct Request {
    /// The decode side, once its request waits.
    pub(super) parked: Option<Parked>,
    /// The sender side.
    pub(super) allocation: Allocation,
    /// Slots that the engine may still be reading although the request has ended for it.
    pub(super) lent: Vec<(EngineId, u32, SlotIndex)>,
    /// Who has spoken of it.
    pub(super) heard: Heard,
    /// Filled as things happen, given out at the end.
    pub(super) record: Record,
}

/// A decode request that waits in its engine with its KV blocks allocated.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) engine: EngineId,
    pub(super) keys: Vec<String>,
    pub(super) tokens: u32,
    pub(super) have_tokens: u32,
    pub(super) since: Time,
    /// The engine's own bound.
    pub(super) deadline: Time,
    /// A sender must have asked by then.
    pub(super) no_sender: Time,
    /// One has asked with other keys.
    pub(super) mismatched: bool,
}

/// How far the sender side is.
#[derive(Debug)]
pub(super) enum Allocation {
    /// No sender has asked.
    None,
    /// A sender has asked and waits for its answer.
    Pending(Pending),
    /// A sender may write.
    Leased(Lease),
}

/// An alloc request without an answer yet.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) route: Route,
    /// Where that comes from.
    pub(super) host: String,
    pub(super) request: AllocRequest,
    pub(super) x: AllocX,
    /// Until then the decode request may park; absent once that time has passed.
    pub(super) park: Option<Time>,
    /// Until then room may appear. Not before `park`.
    pub(super) wait: Time,
}

/// A sender's permission to write this request's chunks.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) id: LeaseId,
    pub(super) route: Route,
    pub(super) sender: SenderId,
    /// Where the sender's connection came from.
    pub(super) host: String,
    pub(super) transport: String,
    /// Number of the alloc request that this lease answers.
    pub(super) seq: u64,
    pub(super) keys: Vec<String>,
    pub(super) tokens: u32,
    /// `have_tokens` of the answer: the chunk that contains it is packed from it on.
    pub(super) first_token: u32,
    pub(super) chunks: Vec<Chunk>,
    /// The sender speaks up within this time.
    pub(super) term: Duration,
    pub(super) deadline: Time,
    /// Since when all of it stands there and no decode request has come for it.
    pub(super) idle: Option<Time>,
    /// Set when nobody wants the data any more; only the sender's word is missing.
    pub(super) end_reason: Option<Reason>,
}

/// One chunk under a lease.
///
/// ```text
/// Waiting ──slot──▶ Open ──Written──▶ Written ──parked──▶ Ready ──Release──▶ Released
///                     │ Writing marks it                                        ▲
/// Skipped (the decode side has it)            Written, below have_tokens ───────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// The decode side holds its tokens: no slot, ever.
    Skipped,
    /// No slot yet.
    Waiting,
    /// The sender may write here.
    Open { slot: SlotIndex, writing: bool },
    /// Complete; nobody has been told.
    Written { slot: SlotIndex },
    /// The engine may be reading it.
    Ready { slot: SlotIndex },
    /// Its slot is back in the pool.
    Released,
}

impl Chunk {
    /// The slot that this chunk holds.
    pub(super) fn slot(self) -> Option<SlotIndex> {
        match self {
            Self::Open { slot, .. } | Self::Written { slot } | Self::Ready { slot } => Some(slot),
            Self::Skipped | Self::Waiting | Self::Released => None,
        }
    }
}

impl Lease {
    /// The tokens that chunk `index` carries.
    pub(super) fn span(&self, index: usize, chunk_tokens: u32) -> (u32, u32) {
        // A lease has at most `max_keys` chunks, far below u32::MAX.
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        chunk_span(index, self.tokens, self.first_token, chunk_tokens)
    }

    /// Every chunk is where it will stay.
    pub(super) fn is_complete(&self) -> bool {
        self.chunks
            .iter()
            .all(|c| matches!(c, Chunk::Skipped | Chunk::Released))
    }

    /// The sender has nothing left to write.
    pub(super) fn is_written(&self) -> bool {
        !self
            .chunks
            .iter()
            .any(|c| matches!(c, Chunk::Waiting | Chunk::Open { .. }))
    }

    /// Chunks that still want a slot.
    pub(super) fn waiting(&self) -> impl Iterator<Item = usize> + '_ {
        let wanted = self.end_reason.is_none();
        (0..self.chunks.len()).filter(move |&i| wanted && self.chunks[i] == Chunk::Waiting)
    }
}

impl Request {
    pub(super) fn new(id: &RequestId) -> Self {
        Self {
            parked: None,
            allocation: Allocation::None,
            lent: Vec::new(),
            heard: Heard::default(),
            record: Record::new(id.clone()),
        }
    }

    pub(super) fn lease(&self) -> Option<&Lease> {
        match &self.allocation {
            Allocation::Leased(lease) => Some(lease),
            Allocation::None | Allocation::Pending(_) => None,
        }
    }

    pub(super) fn lease_mut(&mut self) -> Option<&mut Lease> {
        match &mut self.allocation {
            Allocation::Leased(lease) => Some(lease),
            Allocation::None | Allocation::Pending(_) => None,
        }
    }
}
