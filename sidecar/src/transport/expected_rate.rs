//! Defines the minimum rate to expect from each kind of wire, so that the log reports a wire that silently
//! uses a slower method.

use std::time::{Duration, Instant};

use protocol::dlist::Memory;

use super::Kind;

/// The kind of memory at each end of a link, and whether both ends are on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ends {
    pub(crate) ours: Memory,
    pub(crate) theirs: Memory,
    pub(crate) same_host: bool,
}

/// The minimum rate to expect from a kind of wire: even the slowest wire of this kind is faster.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExpectedRate {
    /// Minimum rate to expect, in 10⁹ bytes per second.
    pub(crate) least_gb_s: f64,
    /// The likely cause of a slower rate, for people.
    pub(crate) hint: &'static str,
}

impl ExpectedRate {
    /// Returns the minimum rate to expect from a wire between these ends.
    pub(crate) fn of(kind: Kind, ends: Ends) -> Self {
        (kind.0.expected_rate)(ends)
    }

    /// Returns the minimum rate to expect from any wire over a network.
    pub(super) fn of_a_network() -> Self {
        Self {
            least_gb_s: 0.1,
            hint: "the network is slower than a gigabit: check which address the receiver advertises",
        }
    }
}

/// Notices a link that is far slower than expected, and limits how often the log reports it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Watch {
    big_writes: u32,
    said: Option<Instant>,
}

impl Watch {
    /// Notes a write and the rate of recent writes. Returns the hint to log now; `None` if there is nothing
    /// to log.
    pub(crate) fn note(
        &mut self,
        expected: ExpectedRate,
        bytes: u64,
        rate: Option<f64>,
        now: Instant,
    ) -> Option<&'static str> {
        if bytes < BIG_BYTES {
            return None;
        }
        self.big_writes = self.big_writes.saturating_add(1);
        // The first writes set up connections and mappings, so they do not show the wire's rate.
        if self.big_writes <= WARM_UP || rate.is_none_or(|rate| rate >= expected.least_gb_s) {
            return None;
        }
        if self
            .said
            .is_some_and(|said| now.duration_since(said) < AGAIN)
        {
            return None;
        }
        self.said = Some(now);
        Some(expected.hint)
    }
}

/// Minimum bytes of a write that counts. Smaller writes are mostly overhead on any wire.
const BIG_BYTES: u64 = 4 << 20;
/// The number of first writes that do not count.
const WARM_UP: u32 = 3;
/// Minimum time between two warnings about a link.
const AGAIN: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{cuda_ipc, nixl, tcp};

    #[test]
    fn a_slow_wire_is_named_once_a_while_after_its_start() {
        let ends = Ends {
            ours: Memory::Vram,
            theirs: Memory::Vram,
            same_host: true,
        };
        let expected = ExpectedRate::of(nixl::KIND, ends);
        let start = Instant::now();
        let mut watch = Watch::default();
        let mut said = |bytes, rate, after| {
            let now = start + Duration::from_secs(after);
            watch.note(expected, bytes, Some(rate), now).is_some()
        };
        for _ in 0..WARM_UP {
            assert!(!said(BIG_BYTES, 0.54, 0));
        }
        assert!(!said(BIG_BYTES - 1, 0.54, 0), "small");
        assert!(!said(BIG_BYTES, 235.0, 0), "fast");
        assert!(said(BIG_BYTES, 0.54, 0));
        assert!(!said(BIG_BYTES, 0.54, 299));
        assert!(said(BIG_BYTES, 0.54, 301));
    }

    #[test]
    fn no_class_is_above_what_was_measured_on_its_slowest_wire() {
        let check = |kind, ours, theirs, same_host, measured: f64| {
            let ends = Ends {
                ours,
                theirs,
                same_host,
            };
            assert!(
                ExpectedRate::of(kind, ends).least_gb_s * 1.9 < measured,
                "{ends:?}"
            );
        };
        check(cuda_ipc::KIND, Memory::Vram, Memory::Vram, true, 12.0);
        check(nixl::KIND, Memory::Vram, Memory::Vram, true, 12.0);
        check(nixl::KIND, Memory::Vram, Memory::Vram, false, 2.0);
        check(nixl::KIND, Memory::Dram, Memory::Dram, true, 1.0);
        check(tcp::KIND, Memory::Vram, Memory::Dram, false, 0.2);
    }
}
