//! How often the engine thread polls.

use std::time::{Duration, Instant};

/// One policy for all polling of the engine thread.
///
/// The library has no call that waits, and whatever is in flight moves only while it is polled. But
/// the peer, the engine and the runtime may need this very core: on two cores a thread that spins
/// makes the copy that it waits for slower. So: spin as long as a small write takes, then let others
/// run first, then sleep, longer the longer nothing comes. Anything that moves starts over.
#[derive(Debug, Default)]
pub(super) struct Pace {
    quiet_since: Option<Instant>,
}

/// What to do before the next poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Spin,
    Yield,
    Sleep(Duration),
}

impl Pace {
    /// After a round of polling in which something moved, or not.
    pub(super) fn wait(&mut self, moved: bool, now: Instant) -> Wait {
        if moved {
            self.quiet_since = None;
            return Wait::Spin;
        }
        let quiet = now.duration_since(*self.quiet_since.get_or_insert(now));
        if quiet < SPIN {
            Wait::Spin
        } else if quiet < YIELD {
            Wait::Yield
        } else if quiet < DOZE {
            Wait::Sleep(NAP)
        } else {
            Wait::Sleep(SLEEP)
        }
    }
}

/// A 64 KiB write takes 4 µs within a host and 31 over TCP.
const SPIN: Duration = Duration::from_micros(30);
/// The round trip of a data centre, with a scheduler's delay in it.
const YIELD: Duration = Duration::from_micros(500);
/// With the kernel's timer slack about 100 µs: at 5 GB/s 0.5 MB, which sockets and their buffers
/// bridge. Costs 5 to 10 % of a core.
const NAP: Duration = Duration::from_micros(50);
/// A peer that has not written for so long is computing, or has stopped.
const DOZE: Duration = Duration::from_millis(5);
/// Costs 2 to 3 % of a core, and a late write as many microseconds.
const SLEEP: Duration = Duration::from_micros(200);

/// A call into the library that takes longer has moved bytes: an idle one takes under 1 µs.
pub(super) const BUSY: Duration = Duration::from_micros(4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_polls_get_rarer_and_movement_starts_over() {
        let mut pace = Pace::default();
        let start = Instant::now();
        let mut check = |us, moved, expect| {
            assert_eq!(pace.wait(moved, start + Duration::from_micros(us)), expect);
        };
        check(0, true, Wait::Spin);
        check(10, false, Wait::Spin);
        check(30, false, Wait::Spin);
        check(50, false, Wait::Yield);
        check(509, false, Wait::Yield);
        check(520, false, Wait::Sleep(NAP));
        check(5_009, false, Wait::Sleep(NAP));
        check(5_010, false, Wait::Sleep(SLEEP));
        check(10_000, false, Wait::Sleep(SLEEP));
        check(10_100, true, Wait::Spin);
        check(10_110, false, Wait::Spin);
    }
}
