//! Counts the events of the engine thread, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// The values of [`Counters`] at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Writes that ended with every byte at the receiver.
    pub(super) done: u64,
    /// Failed writes that can deliver no more bytes.
    pub(super) failed: u64,
    /// Failed writes that may still deliver bytes.
    pub(super) uncertain: u64,
    /// Bytes of the writes that were done, rounded up to whole descriptors.
    pub(super) bytes: u64,
    /// Peers that are connected now.
    pub(super) peers: u64,
    /// Requests that were abandoned and have not ended yet. The thread still polls these requests.
    pub(super) stuck: u64,
}

/// The event counts, which the engine thread writes and any thread reads.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) done: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) uncertain: AtomicU64,
    pub(super) bytes: AtomicU64,
    pub(super) peers: AtomicU64,
    pub(super) stuck: AtomicU64,
}

impl Counters {
    pub(super) fn read(&self) -> Counts {
        // Relaxed order is enough, because the counts are independent: no decision uses two of them.
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            done: read(&self.done),
            failed: read(&self.failed),
            uncertain: read(&self.uncertain),
            bytes: read(&self.bytes),
            peers: read(&self.peers),
            stuck: read(&self.stuck),
        }
    }
}
