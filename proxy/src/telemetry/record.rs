//! The record of a request that has ended, for its log line and its row in `GET /requests`.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use protocol::Reason;
use protocol::record::TRANSPORTS;
use protocol::registration::NotifX;
use serde::Serialize;

/// The record of one request. Times are milliseconds since the request's arrival; `None` if the event did not
/// happen.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Record {
    /// The id of the request.
    pub id: String,
    /// The id that the legs carry; `None` if the legs carry the request's id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leg_id: Option<String>,
    /// Time of the arrival, in milliseconds since 1970.
    pub arrived_unix_ms: u64,
    /// `completions`, `chat`, or the path of an endpoint whose requests are passed on.
    pub endpoint: &'static str,
    /// True if the answer is an event stream.
    pub stream: bool,
    /// The id of the prefill instance; `None` if none was chosen.
    pub prefill: Option<String>,
    /// The id of the decode instance that answered, or that was tried last; `None` if none was tried.
    pub decode: Option<String>,
    /// The reason why routing chose these instances.
    pub choice: String,
    /// The reason why the decode instance computed the prompt itself; `None` if it waited for KV.
    pub alone: Option<&'static str>,
    /// The number of decode legs sent.
    pub decode_attempts: u32,
    /// Time at which the prefill engine began.
    pub begun_ms: Option<f64>,
    /// Time at which the first decode leg was sent.
    pub decode_sent_ms: Option<f64>,
    /// Time at which the prefill leg was answered, or failed.
    pub prefill_ms: Option<f64>,
    /// The prefill leg's error; `None` if the leg did not fail.
    pub prefill_error: Option<String>,
    /// Time of the first byte of the answer.
    pub ttft_ms: Option<f64>,
    /// Time of the end.
    pub total_ms: f64,
    /// The prompt's length in tokens, as an engine counts it; `None` if no engine reported it.
    pub prompt_tokens: Option<u64>,
    /// Number of the prompt's tokens that the instance which computes the prompt was expected to hold; `None` if
    /// routing did not ask.
    pub held_tokens: Option<u64>,
    /// The answer's length in tokens, as the decode engine counts it; `None` if the answer does not contain
    /// the number. A stream contains it only with `include_usage`.
    pub completion_tokens: Option<u64>,
    /// The senders' notices about the KV; `None` if none has come.
    pub moved: Option<Moved>,
    /// The HTTP status that the client got.
    pub status: Option<u16>,
    /// `done`, `refused`, `failed`, `broken` or `client_left`.
    pub outcome: &'static str,
    /// The error as text for people; `None` if there was no error.
    pub error: Option<String>,
}

/// The notices of a sender about a request's KV, summed over its ranks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Moved {
    /// True if every rank that sent a notice wrote all the KV that was requested.
    pub ok: bool,
    /// The reason in the first notice with a reason; `None` if no rank gave a reason.
    pub reason: Option<Reason>,
    /// The number of bytes written.
    pub bytes: u64,
    /// Time of the slowest rank from the reservation to the last write, in microseconds.
    pub us: u64,
    /// The transport; empty if unknown.
    pub transport: String,
    /// The number of notices received.
    pub ranks: u32,
}

/// The records of the last 256 requests, for `GET /requests`.
#[derive(Debug, Default)]
pub(crate) struct Recent {
    records: Mutex<VecDeque<Record>>,
}

impl Moved {
    /// Adds the notice of one rank. `notice` is `None` if LMCache sent the notice, which has no details.
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

/// Returns the name of a transport for metrics and logs. An unknown name becomes `other`, so that no sidecar
/// can write arbitrary text into the log.
fn transport_name(text: &str) -> &str {
    let kind = text.split([':', '/', ' ']).next().unwrap_or_default();
    match kind {
        "" => "",
        _ if TRANSPORTS.contains(&kind) => text
            .get(..text.len().min(MAX_TRANSPORT_BYTES))
            .unwrap_or(kind),
        _ => "other",
    }
}

impl Recent {
    /// Adds the record of a request that has ended. If there are more than 256 records, drops the oldest
    /// record.
    pub(crate) fn push(&self, record: Record) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.len() == KEPT {
            records.pop_front();
        }
        records.push_back(record);
    }

    /// Adds a notice that came after the request's end. Returns true if the request's record is still kept.
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

    /// Returns all records, the oldest first.
    pub(crate) fn all(&self) -> Vec<Record> {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.iter().cloned().collect()
    }
}

/// Number of records that are kept: enough to look back over a benchmark run. A record takes about 500 bytes.
const KEPT: usize = 256;

/// The longest name of a transport, such as `nixl:cuda_ipc+rdma`.
const MAX_TRANSPORT_BYTES: usize = 48;

#[cfg(test)]
mod tests;
