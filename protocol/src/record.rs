//! Result of one request, for logs, metrics and `/requests`.

use serde::{Deserialize, Serialize};

use crate::{Reason, RequestId};

/// Names of all transports in adverts, records and notifications, best first.
pub const TRANSPORTS: [&str; 3] = ["cuda_ipc", "nixl", "tcp"];

/// One ended request, from the view of one sidecar. All times are in microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The request.
    pub req: RequestId,
    /// Peer, for the log: `host:port` of a receiver, name of a sender.
    pub peer: String,
    /// Reason for the failure. Absent if every wanted chunk arrived.
    pub reason: Option<Reason>,
    /// Tokens that the request's keys cover.
    pub tokens: u32,
    /// Tokens that the decode side already had.
    pub have_tokens: u32,
    /// Chunks that were written.
    pub chunks: u32,
    /// Bytes that were written.
    pub bytes: u64,
    /// Transport, for example `nixl`; empty if the request ended before a transport was known.
    pub transport: String,
    /// Sender: time from the reservation to the receiver's first answer.
    pub alloc_us: u64,
    /// Sender: sum of the engine's gather times.
    pub gather_us: u64,
    /// Sender: time during which at least one write of this request was in flight.
    pub push_us: u64,
    /// Receiver: time from parking to the last chunk that became ready.
    pub ready_us: u64,
    /// Receiver: sum of the engine's scatter times.
    pub scatter_us: u64,
    /// Number of chunks for which the first answer had no slot.
    pub windowed: u32,
}

impl Record {
    /// Returns the record of a new request.
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
