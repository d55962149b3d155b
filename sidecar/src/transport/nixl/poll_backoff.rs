//! How often the engine thread polls.

use std::time::{Duration, Instant};

/// One policy for all polling of the engine thread.
///
/// The library has no call that waits, and whatever is in flight moves only while it is polled. But
/// the peer, the engine and the runtime may need this very core: on two cores a thread that spins
/// makes the copy that it waits for slower. So: spin as long as a small write takes, then let others
/// run first, then sleep, longer the longer nothing comes. Anything that moves starts over.
#[derive(Debug, Default)]
pub(super) struct PollBackoff {
    quiet_since: Option<Instant>,
    slept: bool,
}

/// What to do before the next poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Spin,
    Yield,
    Sleep(Duration),
}

impl PollBackoff {
    /// After a round of polling in which something moved, or not.
    pub(super) fn wait(&mut self, moved: bool, now: Instant) -> Wait {
        if moved {
            *self = Self::default();
            return Wait::Spin;
        }
        let quiet = now.duration_since(*self.quiet_since.get_or_insert(now));
        let wait = if quiet < SPIN {
            Wait::Spin
        } else if quiet < YIELD {
            Wait::Yield
        } else if quiet < DOZE {
            Wait::Sleep(NAP)
        } else if quiet < DROWSE {
            Wait::Sleep(SHORT)
        } else {
            Wait::Sleep(LONG)
        };
        self.slept = matches!(wait, Wait::Sleep(_));
        wait
    }

    /// After a round in which nothing moved, when only the writes of peers are awaited.
    ///
    /// Most wires need no help of this side (shared memory, RDMA, NVLink), and spinning beside a peer
    /// on the same host takes the very core that copies: naps from the beginning. Sockets bridge them.
    pub(super) fn expect(&mut self, now: Instant) -> Wait {
        match self.wait(false, now) {
            Wait::Spin | Wait::Yield => {
                self.slept = true;
                Wait::Sleep(NAP)
            }
            sleep @ Wait::Sleep(_) => sleep,
        }
    }

    /// How long a call into the library must take to have moved something.
    pub(super) fn busy(&self) -> Duration {
        if self.slept { BUSY_COLD } else { BUSY }
    }
}

/// A 64 KiB write takes 4 µs within a host and 31 over TCP.
const SPIN: Duration = Duration::from_micros(30);
/// The round trip of a data centre, with a scheduler's delay in it.
const YIELD: Duration = Duration::from_micros(500);
/// With the kernel's timer slack about 100 µs: at 5 GB/s 0.5 MB, which sockets and their buffers
/// bridge. Each wake costs 5 to 20 µs of a core.
const NAP: Duration = Duration::from_micros(50);
/// What is announced is about to be posted; a peer that is quiet for so long was held up.
const DOZE: Duration = Duration::from_millis(5);
const SHORT: Duration = Duration::from_micros(200);
/// It writes without this side's help (shared memory, RDMA), or has stopped.
const DROWSE: Duration = Duration::from_millis(50);
/// About 3 % of a core; a write that comes after all is late by a fiftieth of its pause.
const LONG: Duration = Duration::from_millis(1);

/// A call into the library that takes longer has moved bytes: an idle one takes under 1 µs.
const BUSY: Duration = Duration::from_micros(4);
/// After a sleep the caches are cold, and an idle call takes up to 15 µs on a busy machine. What a
/// wire of 1 GB/s brings during a sleep takes longer.
const BUSY_COLD: Duration = Duration::from_micros(25);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quiet_polls_get_rarer_and_movement_starts_over() {
        let mut backoff = PollBackoff::default();
        let start = Instant::now();
        let mut check = |us, moved, expect| {
            assert_eq!(
                backoff.wait(moved, start + Duration::from_micros(us)),
                expect
            );
        };
        check(0, true, Wait::Spin);
        check(10, false, Wait::Spin);
        check(30, false, Wait::Spin);
        check(50, false, Wait::Yield);
        check(509, false, Wait::Yield);
        check(520, false, Wait::Sleep(NAP));
        check(5_009, false, Wait::Sleep(NAP));
        check(5_010, false, Wait::Sleep(SHORT));
        check(50_009, false, Wait::Sleep(SHORT));
        check(50_010, false, Wait::Sleep(LONG));
        check(60_000, true, Wait::Spin);
        check(60_010, false, Wait::Spin);
    }

    #[test]
    fn who_only_expects_never_spins() {
        let mut backoff = PollBackoff::default();
        let start = Instant::now();
        assert_eq!(backoff.expect(start), Wait::Sleep(NAP));
        assert_eq!(backoff.busy(), BUSY_COLD);
        let later = start + DROWSE + Duration::from_millis(1);
        assert_eq!(backoff.expect(later), Wait::Sleep(LONG));
        // Bytes came: the next ones follow at once.
        assert_eq!(backoff.wait(true, later), Wait::Spin);
    }
}
