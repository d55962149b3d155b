//! The counters of a bound port.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The counters of a bound port. All clones share the same numbers: the port counts with one clone,
/// and the metrics read another clone.
#[derive(Clone, Debug, Default)]
pub struct Traffic(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    wrong_frames: AtomicU64,
    evicted: AtomicU64,
    unread: AtomicU64,
    failed_handshakes: AtomicU64,
}

impl Traffic {
    /// Returns every counter with its name in metrics. `connections` is the present number, not a sum.
    pub fn events(&self) -> [(&'static str, u64); 5] {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let of = &self.0;
        [
            ("connections", read(&of.connections)),
            ("wrong_frames", read(&of.wrong_frames)),
            ("evicted", read(&of.evicted)),
            ("unread", read(&of.unread)),
            ("failed_handshakes", read(&of.failed_handshakes)),
        ]
    }

    /// Sets the present number of connections.
    pub(super) fn connected(&self, now: usize) {
        self.0.connections.store(now as u64, Ordering::Relaxed);
    }

    /// Counts a message with wrong frames. Returns the new count.
    pub(super) fn wrong_frames(&self) -> u64 {
        count(&self.0.wrong_frames)
    }

    /// Counts a connection that was ended to make room for others. Returns the new count.
    pub(super) fn evicted(&self) -> u64 {
        count(&self.0.evicted)
    }

    /// Counts an answer that was dropped because the peer does not read. Returns the new count.
    pub(super) fn unread(&self) -> u64 {
        count(&self.0.unread)
    }

    /// Counts a connection that failed in ZeroMQ's own handshake. Returns the new count.
    pub(super) fn failed_handshake(&self) -> u64 {
        count(&self.0.failed_handshakes)
    }
}

fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed) + 1
}
