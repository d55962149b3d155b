//! What is known of a request when it has ended: its log line, and its row in `GET /requests`.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use protocol::Reason;
use protocol::registration::NotifX;
use serde::Serialize;

/// One request. Times are milliseconds since its arrival.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Record {
    /// The request.
    pub id: String,
    /// What the legs carry instead, where a connector or a second attempt wants another id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leg_id: Option<String>,
    /// Arrival, milliseconds since 1970.
    pub arrived_unix_ms: u64,
    /// `completions` or `chat`.
    pub endpoint: &'static str,
    /// The answer is an event stream.
    pub stream: bool,
    /// The prefill instance, if any was chosen.
    pub prefill: Option<String>,
    /// The decode instance that answered, or was tried last.
    pub decode: Option<String>,
    /// The reason of the choice.
    pub choice: String,
    /// Why the decode instance computed the prompt itself; absent if it waited for KV.
    pub alone: Option<&'static str>,
    /// Decode legs sent.
    pub decode_attempts: u32,
    /// The prefill engine began.
    pub begun_ms: Option<f64>,
    /// The decode leg was sent.
    pub decode_sent_ms: Option<f64>,
    /// The prefill leg was answered, or failed.
    pub prefill_ms: Option<f64>,
    /// How the prefill leg ended, if badly.
    pub prefill_error: Option<String>,
    /// The first byte of the answer.
    pub ttft_ms: Option<f64>,
    /// The end.
    pub total_ms: f64,
    /// As the engines count them.
    pub prompt_tokens: Option<u64>,
    /// As the decode engine counts them; a stream says it only with `include_usage`.
    pub completion_tokens: Option<u64>,
    /// What the sender sidecar said about the KV.
    pub moved: Option<Moved>,
    /// HTTP status that the client got.
    pub status: Option<u16>,
    /// `done`, `refused`, `failed`, `broken` or `client_left`.
    pub outcome: &'static str,
    /// What went wrong, for people.
    pub error: Option<String>,
}

/// The sender sidecar's word on a request's KV, summed over its ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Moved {
    /// Every rank wrote all that was wanted.
    pub ok: bool,
    /// The first rank's reason, if one did not.
    pub reason: Option<Reason>,
    /// Bytes written.
    pub bytes: u64,
    /// The slowest rank, from the reservation to the last write, microseconds.
    pub us: u64,
    /// The wire; empty if unknown.
    pub transport: String,
    /// Notices received.
    pub ranks: u32,
}

/// The last requests, for `GET /requests`.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    records: Mutex<VecDeque<Record>>,
}

impl Moved {
    /// Adds the notice of one rank; LMCache's has no details.
    pub(crate) fn add(&mut self, notice: Option<&NotifX>) {
        let first = self.ranks == 0;
        let ok = notice.is_none_or(|x| x.ok);
        self.ok = ok && (first || self.ok);
        self.ranks = self.ranks.saturating_add(1);
        if let Some(x) = notice {
            self.reason = self.reason.or(x.reason);
            self.bytes = self.bytes.saturating_add(x.bytes);
            self.us = self.us.max(x.us);
            if self.transport.is_empty() {
                transport_name(&x.transport).clone_into(&mut self.transport);
            }
        }
    }
}

/// The wires that metrics and logs name: a stranger's words become `other`.
fn transport_name(text: &str) -> &str {
    let kind = text.split([':', '/', ' ']).next().unwrap_or_default();
    match kind {
        "" => "",
        "nixl" | "tcp" | "cuda_ipc" => text
            .get(..text.len().min(MAX_TRANSPORT_BYTES))
            .unwrap_or(kind),
        _ => "other",
    }
}

impl Recent {
    /// Adds a request that has ended, and forgets the oldest beyond 256.
    pub(crate) fn push(&self, record: Record) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() == KEPT {
            records.pop_front();
        }
        records.push_back(record);
    }

    /// Adds a notice that came after the request's end. Returns whether anybody was meant.
    pub(crate) fn amend(&self, id: &str, notice: Option<&NotifX>) -> bool {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(record) = records
            .iter_mut()
            .rev()
            .find(|record| record.leg_id.as_deref().unwrap_or(&record.id) == id)
        else {
            return false;
        };
        record.moved.get_or_insert_default().add(notice);
        true
    }

    /// All of them, oldest first.
    pub(crate) fn all(&self) -> Vec<Record> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.iter().cloned().collect()
    }
}

/// Enough to look back over a benchmark run; about 500 bytes each.
const KEPT: usize = 256;

/// `nixl:cuda_ipc+rdma` and the like.
const MAX_TRANSPORT_BYTES: usize = 48;

#[cfg(test)]
mod tests;
