//! What a bound port has seen: counted where it happens, read when somebody asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared by a port and whoever shows it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Traffic(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    wrong_frames: AtomicU64,
    evicted: AtomicU64,
    unread: AtomicU64,
    failed_handshakes: AtomicU64,
}

impl Traffic {
    /// Every number by its name in metrics; `connections` is how many there are now.
    pub(crate) fn events(&self) -> [(&'static str, u64); 5] {
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

    /// One of them.
    #[cfg(test)]
    pub(crate) fn of(&self, name: &str) -> u64 {
        let found = self.events().into_iter().find(|(event, _)| *event == name);
        found.expect("a name of an event").1
    }

    /// Connections now.
    pub(super) fn connected(&self, now: usize) {
        self.0.connections.store(now as u64, Ordering::Relaxed);
    }

    /// A message that had the wrong frames: how many by now, as for each of the following.
    pub(super) fn wrong_frames(&self) -> u64 {
        count(&self.0.wrong_frames)
    }

    /// A connection ended to make room for others.
    pub(super) fn evicted(&self) -> u64 {
        count(&self.0.evicted)
    }

    /// An answer dropped because the peer does not read.
    pub(super) fn unread(&self) -> u64 {
        count(&self.0.unread)
    }

    /// A connection that did not get through ZeroMQ's own handshake.
    pub(super) fn failed_handshake(&self) -> u64 {
        count(&self.0.failed_handshakes)
    }
}

fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed) + 1
}
