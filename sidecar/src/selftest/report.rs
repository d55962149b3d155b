//! What a self-test found, for people and for scripts.

use std::sync::PoisonError;

use protocol::record::Record;
use serde::Serialize;

use super::{Rounds, Seen};
use crate::config::Wire;
use crate::side::Side;

/// One wire.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    transport: &'static str,
    reported: String,
    requests: usize,
    chunks: u64,
    bytes: u64,
    /// Chunks whose bytes differ.
    pub(super) wrong: u64,
    /// Median over the requests of bytes by time on the wire, 10⁹ bytes a second.
    push_gb_s: f64,
    /// From reservation to ready for one chunk, microseconds.
    one_chunk_us_p50: u64,
    one_chunk_us_p99: u64,
}

impl Report {
    pub(super) fn new(wire: Wire, rounds: &Rounds, seen: &Seen) -> Self {
        let records = seen.records.lock().unwrap_or_else(PoisonError::into_inner);
        let pushed: Vec<&Record> = records
            .iter()
            .filter(|(side, record)| *side == Side::Sender && record.reason.is_none())
            .map(|(_, record)| record)
            .collect();
        let mut rates: Vec<f64> = pushed
            .iter()
            .filter(|r| r.chunks > 1 && r.push_us > 0)
            .map(|r| rate(r))
            .collect();
        rates.sort_unstable_by(f64::total_cmp);
        let mut times: Vec<u64> = rounds
            .one_chunk
            .iter()
            .map(|t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX))
            .collect();
        times.sort_unstable();
        Self {
            transport: wire.as_str(),
            reported: seen
                .reported
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            requests: pushed.len(),
            chunks: rounds.chunks,
            bytes: pushed.iter().map(|r| r.bytes).sum(),
            wrong: rounds.wrong,
            push_gb_s: quantile(&rates, 0.5).unwrap_or_default(),
            one_chunk_us_p50: quantile(&times, 0.5).unwrap_or_default(),
            one_chunk_us_p99: quantile(&times, 0.99).unwrap_or_default(),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate(record: &Record) -> f64 {
    record.bytes as f64 / record.push_us as f64 / 1e3
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index below the number of samples"
)]
fn quantile<T: Copy>(sorted: &[T], q: f64) -> Option<T> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get((last as f64 * q).round() as usize).copied()
}

/// Prints all wires.
pub(super) fn print(reports: &[Report], json: bool) {
    if json {
        // Plain numbers and strings always serialise.
        println!("{}", serde_json::to_string(reports).unwrap_or_default());
        return;
    }
    println!(
        "{:<10} {:>8} {:>8} {:>12} {:>7} {:>10} {:>16}  reported",
        "transport", "requests", "chunks", "bytes", "wrong", "push GB/s", "1 chunk p50/p99"
    );
    for r in reports {
        println!(
            "{:<10} {:>8} {:>8} {:>12} {:>7} {:>10.2} {:>9}/{} us  {}",
            r.transport,
            r.requests,
            r.chunks,
            r.bytes,
            r.wrong,
            r.push_gb_s,
            r.one_chunk_us_p50,
            r.one_chunk_us_p99,
            r.reported
        );
    }
}
