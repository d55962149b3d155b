//! State of one request at the receiver.

use std::time::Duration;

use super::ended::Heard;
use super::{Owner, Route, SenderId};
use crate::message::{AllocRequest, AllocX};
use crate::plan::{Chunking, Plan};
use crate::record::Record;
use crate::{EngineId, LeaseId, Reason, RequestId, SlotIndex, Time};

/// One request: its decode side and its sender side.
#[derive(Debug)]
pub(super) struct Request {
    /// Decode side. Absent: no decode request is parked.
    pub(super) parked: Option<Parked>,
    /// Sender side.
    pub(super) allocation: Allocation,
    /// Slots that the engine may still read although the request has ended.
    pub(super) lent: Vec<(EngineId, u32, SlotIndex)>,
    /// Messages that have come from both sides.
    pub(super) heard: Heard,
    /// Result so far, which the receiver reports at the end.
    pub(super) record: Record,
}

/// A decode request that waits in its engine, with its KV blocks allocated.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) engine: EngineId,
    pub(super) keys: Vec<String>,
    pub(super) tokens: u32,
    pub(super) have_tokens: u32,
    pub(super) since: Time,
    /// Deadline that the engine set.
    pub(super) deadline: Time,
    /// Deadline for the first alloc request.
    pub(super) no_sender: Time,
    /// True if an alloc request with other keys has come.
    pub(super) mismatched: bool,
}

/// State of the sender side.
#[derive(Debug)]
pub(super) enum Allocation {
    /// No sender has asked.
    None,
    /// A sender has asked for slots and has got no answer yet.
    Pending(Pending),
    /// A sender may write under a lease.
    Leased(Lease),
}

/// An alloc request without an answer yet.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) route: Route,
    pub(super) owner: Owner,
    pub(super) request: AllocRequest,
    pub(super) x: AllocX,
    /// Number of slots that the request needs if the decode side has no tokens.
    pub(super) wanted: usize,
    /// Time until which the receiver waits for the decode request. Absent: the receiver no longer
    /// waits for the decode request.
    pub(super) park: Option<Time>,
    /// Time until which the receiver waits for free slots. This time is never before `park`.
    pub(super) wait: Time,
}

/// A sender's permission to write this request's chunks.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) id: LeaseId,
    pub(super) route: Route,
    pub(super) sender: SenderId,
    pub(super) owner: Owner,
    pub(super) transport: String,
    /// Sequence number of the alloc request that this lease answers.
    pub(super) seq: u64,
    pub(super) keys: Vec<String>,
    pub(super) tokens: u32,
    /// `have_tokens` of the answer: the first token that is moved. If a chunk also contains earlier
    /// tokens, the chunk carries only the tokens from this position on.
    pub(super) first_token: u32,
    pub(super) chunks: Vec<Chunk>,
    /// Duration of the lease, counted again from each message of the sender.
    pub(super) term: Duration,
    pub(super) deadline: Time,
    /// Time at which the last chunk was written, if no decode request had come by then. Absent: a
    /// chunk is not written yet, or the decode request came first.
    pub(super) idle: Option<Time>,
    /// Reason of the lease's end; present if the data is not wanted any more and only the sender's
    /// confirmation is missing.
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
    /// Nothing of this chunk has to move: the decode side already has its tokens, or needs none of
    /// them. The chunk never gets a slot.
    Skipped,
    /// The chunk has no slot yet.
    Waiting,
    /// The sender may write into the slot. `writing` is true after the sender has announced its
    /// write.
    Open { slot: SlotIndex, writing: bool },
    /// The chunk is complete, but the receiver has not told the engine yet.
    Written { slot: SlotIndex },
    /// The engine may read the slot.
    Ready { slot: SlotIndex },
    /// The slot is free again.
    Released,
}

impl Chunk {
    /// Returns the slot that this chunk holds; `None` if it holds none.
    pub(super) fn slot(self) -> Option<SlotIndex> {
        match self {
            Self::Open { slot, .. } | Self::Written { slot } | Self::Ready { slot } => Some(slot),
            Self::Skipped | Self::Waiting | Self::Released => None,
        }
    }
}

impl Lease {
    /// Returns what each chunk carries.
    pub(super) fn plan<'a>(&self, chunking: &'a Chunking) -> Plan<'a> {
        chunking.plan(self.tokens, self.first_token)
    }

    /// Returns true if every chunk has been read or was skipped.
    pub(super) fn is_complete(&self) -> bool {
        self.chunks
            .iter()
            .all(|c| matches!(c, Chunk::Skipped | Chunk::Released))
    }

    /// Returns true if the sender has nothing left to write.
    pub(super) fn is_written(&self) -> bool {
        !self
            .chunks
            .iter()
            .any(|c| matches!(c, Chunk::Waiting | Chunk::Open { .. }))
    }

    /// Returns the chunks that still need a slot.
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
