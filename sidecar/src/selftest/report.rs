//! The result of a self-test, as a table for people and as JSON for scripts.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Rounds;
use crate::transport::Kind;

/// The result of one wire with one kind of memory.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    transport: &'static str,
    /// The memory of the buffers.
    memory: String,
    reported: String,
    requests: usize,
    chunks: u64,
    bytes: u64,
    /// Number of chunks with wrong bytes.
    pub(super) wrong: u64,
    /// Rate in 10⁹ bytes per second: a request's bytes divided by its time on the wire; median of all
    /// requests.
    push_gb_s: f64,
    /// Rate in 10⁹ bytes per second that the sender measured for the wire alone; 0 if the sender measured no
    /// rate.
    wire_gb_s: f64,
    /// Rate in 10⁹ bytes per second: a request's bytes divided by the time from its last `Staged` message
    /// until the last chunk is ready; median of all requests.
    staged_ready_gb_s: f64,
    /// Rate in 10⁹ bytes per second: a request's bytes divided by the time from the end of the GPU's filling
    /// until the last chunk is ready; median of all requests.
    fired_ready_gb_s: f64,
    /// Microseconds from the `Staged` message until the chunk is ready, for requests of one chunk.
    one_chunk_us_p50: u64,
    one_chunk_us_p99: u64,
}

/// The sender's link, as its status shows it.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct LinkRow {
    pub(super) reported: String,
    pub(super) measured_gb_per_s: Option<f64>,
}

/// A request as the sender recorded it.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Pushed {
    pub(super) chunks: u32,
    pub(super) bytes: u64,
    pub(super) push_us: u64,
}

impl Report {
    pub(super) fn new(
        wire: Kind,
        memory: String,
        link: LinkRow,
        rounds: &Rounds,
        pushed: &[Pushed],
    ) -> Self {
        let many = pushed.iter().filter(|p| p.chunks > 1);
        let rates = many.map(|p| rate(p.bytes, Duration::from_micros(p.push_us)));
        let of =
            |all: &[(u64, Duration)]| median(all.iter().map(|(bytes, time)| rate(*bytes, *time)));
        let times = rounds.one_chunk.iter();
        let micros = |t: &Duration| u64::try_from(t.as_micros()).unwrap_or(u64::MAX);
        let mut times: Vec<u64> = times.map(micros).collect();
        times.sort_unstable();
        Self {
            transport: wire.as_str(),
            memory,
            reported: link.reported,
            wire_gb_s: link.measured_gb_per_s.unwrap_or_default(),
            requests: pushed.len(),
            chunks: rounds.chunks,
            bytes: pushed.iter().map(|p| p.bytes).sum(),
            wrong: rounds.wrong,
            push_gb_s: median(rates),
            staged_ready_gb_s: of(&rounds.staged_ready),
            fired_ready_gb_s: of(&rounds.fired_ready),
            one_chunk_us_p50: quantile(&times, 0.5).unwrap_or_default(),
            one_chunk_us_p99: quantile(&times, 0.99).unwrap_or_default(),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn rate(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64() / 1e9
}

fn median(rates: impl Iterator<Item = f64>) -> f64 {
    let mut rates: Vec<f64> = rates.filter(|rate| rate.is_finite()).collect();
    rates.sort_unstable_by(f64::total_cmp);
    quantile(&rates, 0.5).unwrap_or_default()
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

/// Prints the results of all wires.
pub(super) fn print(reports: &[Report], json: bool) {
    if json {
        // Numbers and strings always serialise, so the default is never used.
        println!("{}", serde_json::to_string(reports).unwrap_or_default());
        return;
    }
    println!(
        "{:<10} {:<16} {:>8} {:>8} {:>13} {:>6} {:>9} {:>9} {:>12} {:>11} {:>17}  reported",
        "transport",
        "memory",
        "requests",
        "chunks",
        "bytes",
        "wrong",
        "wire GB/s",
        "push GB/s",
        "staged-ready",
        "fired-ready",
        "1 chunk p50/p99"
    );
    for r in reports {
        println!(
            "{:<10} {:<16} {:>8} {:>8} {:>13} {:>6} {:>9.2} {:>9.2} {:>12.2} {:>11.2} {:>11}/{} us  {}",
            r.transport,
            r.memory,
            r.requests,
            r.chunks,
            r.bytes,
            r.wrong,
            r.wire_gb_s,
            r.push_gb_s,
            r.staged_ready_gb_s,
            r.fired_ready_gb_s,
            r.one_chunk_us_p50,
            r.one_chunk_us_p99,
            r.reported
        );
    }
}
