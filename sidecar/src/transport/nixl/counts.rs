//! What the engine thread has done, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// A reading of [`Counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Writes that ended with every byte at the receiver.
    pub(super) done: u64,
    /// Writes that failed and ended.
    pub(super) failed: u64,
    /// Writes that failed without an end that can be known.
    pub(super) uncertain: u64,
    /// Bytes of the writes that were done, rounded up to descriptors.
    pub(super) bytes: u64,
    /// Peers connected now.
    pub(super) peers: u64,
    /// Requests that were given up, have not ended and are polled on, now.
    pub(super) stuck: u64,
}

/// Written by the engine thread, read by any.
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
        // Relaxed: each is a number of its own, and nothing is decided by two of them.
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
