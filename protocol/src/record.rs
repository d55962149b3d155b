//! What a machine says of a request when it has ended: the source of logs, metrics and `/requests`.

use serde::{Deserialize, Serialize};

use crate::{Reason, RequestId};

/// One ended request, as one sidecar saw it. Times are microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The request.
    pub req: RequestId,
    /// The peer, for people: `host:port` of a receiver, name of a sender.
    pub peer: String,
    /// Absent if every wanted chunk arrived.
    pub reason: Option<Reason>,
    /// Tokens that the request's keys cover.
    pub tokens: u32,
    /// Tokens of them that the decode side held already.
    pub have_tokens: u32,
    /// Chunks that were written.
    pub chunks: u32,
    /// Bytes that were written.
    pub bytes: u64,
    /// The wire, e.g. `nixl`; empty if nothing moved.
    pub transport: String,
    /// Sender: from the reservation to the receiver's first answer.
    pub alloc_us: u64,
    /// Sender: the engine's gathers, summed.
    pub gather_us: u64,
    /// Sender: the time in which at least one write of this request was under way.
    pub push_us: u64,
    /// Receiver: from parking to the last chunk ready.
    pub ready_us: u64,
    /// Receiver: the engine's scatters, summed.
    pub scatter_us: u64,
    /// Receiver: chunks that waited for a slot.
    pub windowed: u32,
}

impl Record {
    /// Of a request of which nothing has happened yet.
    pub fn new(req: RequestId) -> Self {
        Self {
            req,
            peer: String::new(),
            reason: None,
            tokens: 0,
            have_tokens: 0,
            chunks: 0,
            bytes: 0,
            transport: String::new(),
            alloc_us: 0,
            gather_us: 0,
            push_us: 0,
            ready_us: 0,
            scatter_us: 0,
            windowed: 0,
        }
    }
}
