//! Counts the events of the receiving half for metrics, and limits the log lines that a flood of events can
//! cause.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::frame::Refusal;

/// The totals since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Connections that were accepted.
    pub(super) accepted: u64,
    /// Connections that were closed to make room for others.
    pub(super) evicted: u64,
    /// Connections that broke within a write.
    pub(super) broken: u64,
    /// Batches that landed completely.
    pub(super) batches: u64,
    /// Bytes of the batches that landed.
    pub(super) bytes: u64,
    /// Batches and connections that were refused, for every reason.
    pub(super) refused: Vec<(Refusal, u64)>,
}

impl Counts {
    /// Returns the counts with the names that metrics use.
    pub(super) fn named(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("connections_accepted", self.accepted),
            ("connections_evicted", self.evicted),
            ("connections_broken", self.broken),
            ("batches_landed", self.batches),
            ("bytes_landed", self.bytes),
        ];
        all.extend(
            self.refused
                .iter()
                .map(|(why, count)| (why.as_str(), *count)),
        );
        all
    }
}

/// The counters behind [`Counts`]. Relaxed order is enough, because the counts are independent.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) accepted: AtomicU64,
    pub(super) evicted: AtomicU64,
    pub(super) broken: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) bytes: AtomicU64,
    refused: [AtomicU64; Refusal::ALL.len()],
    /// The limit of log lines that refusals and broken connections share.
    pub(super) log: Quiet,
}

impl Counters {
    pub(super) fn refuse(&self, why: Refusal) {
        self.refused[why.index()].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            accepted: get(&self.accepted),
            evicted: get(&self.evicted),
            broken: get(&self.broken),
            batches: get(&self.batches),
            bytes: get(&self.bytes),
            refused: Refusal::ALL
                .iter()
                .map(|&why| (why, get(&self.refused[why.index()])))
                .collect(),
        }
    }
}

/// Allows a few log lines in each second.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    window: Option<Instant>,
    lines: u32,
    dropped: u64,
}

impl Quiet {
    /// Returns the number of lines that were dropped before this line; `None` if this line must be dropped,
    /// too.
    pub(super) fn allow(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = state
            .window
            .is_none_or(|begin| now.saturating_duration_since(begin) >= WINDOW);
        if fresh {
            state.window = Some(now);
            state.lines = 0;
        }
        if state.lines >= LINES {
            state.dropped += 1;
            return None;
        }
        state.lines += 1;
        Some(std::mem::take(&mut state.dropped))
    }
}

const WINDOW: Duration = Duration::from_secs(1);
/// The lines per second: enough to see the problem, too few to fill a disk.
const LINES: u32 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_lines_becomes_a_few_that_count_the_rest() {
        let quiet = Quiet::default();
        let start = Instant::now();
        let allowed = (0..100).filter(|_| quiet.allow(start).is_some()).count();
        assert_eq!(allowed, 5);
        assert_eq!(quiet.allow(start + WINDOW), Some(95));
        assert_eq!(quiet.allow(start + WINDOW), Some(0));
    }
}
