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
    /// True if peers prove a key, so that there can be refusals.
    keyed: bool,
    refused: [AtomicU64; REFUSALS.len()],
}

/// Reasons for which a port whose peers prove a key refuses or ends a connection, with their names in metrics. `other`
/// stays last.
const REFUSALS: [&str; 8] = [
    "refused_plain",
    "refused_tls",
    "refused_timeout",
    "refused_flood",
    "refused_unknown_key",
    "refused_role",
    "revoked",
    "refused_other",
];

impl Traffic {
    /// Returns the counters of a port whose peers prove a key.
    pub(super) fn keyed() -> Self {
        Self(Arc::new(Counters {
            keyed: true,
            ..Counters::default()
        }))
    }

    /// Returns every counter with its name in metrics. `connections` is the present number, not a sum.
    pub fn events(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let of = &self.0;
        let refused = REFUSALS.iter().zip(&of.refused).filter(|_| of.keyed);
        let refused: Vec<_> = refused.map(|(name, count)| (*name, read(count))).collect();
        [
            ("connections", read(&of.connections)),
            ("wrong_frames", read(&of.wrong_frames)),
            ("evicted", read(&of.evicted)),
            ("unread", read(&of.unread)),
            ("failed_handshakes", read(&of.failed_handshakes)),
        ]
        .into_iter()
        .chain(refused)
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

    /// Counts a connection that was refused or ended because of its key, by the reason. Returns the new count.
    pub(super) fn refused(&self, reason: &str) -> u64 {
        let is_reason = |name: &&str| name.strip_prefix("refused_").unwrap_or(name) == reason;
        let at = REFUSALS.iter().position(is_reason);
        count(&self.0.refused[at.unwrap_or(REFUSALS.len() - 1)])
    }
}

fn count(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed) + 1
}
