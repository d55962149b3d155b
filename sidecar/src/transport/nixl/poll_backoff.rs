//! Chooses the engine thread's pauses between polls.

use std::time::{Duration, Instant};

/// The only policy for the pauses between the engine thread's polls.
///
/// The library has no call that waits, and a transfer moves only while the thread polls. But the peer, the
/// engine and the runtime may need the same core: on two cores, a thread that spins slows down the copy that it
/// waits for. So the thread first spins as long as a small write takes, then yields to other threads, and then
/// sleeps. The longer nothing moves, the longer the thread sleeps. When something moves, the thread spins
/// again.
#[derive(Debug, Default)]
pub(super) struct PollBackoff {
    quiet_since: Option<Instant>,
    slept: bool,
}

/// The pause before the next poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    Spin,
    Yield,
    Sleep(Duration),
}

impl PollBackoff {
    /// Returns the pause after a poll. `moved` is true if something moved in the poll.
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

    /// Returns the pause after a poll in which nothing moved, if the thread waits only for the writes of
    /// peers.
    ///
    /// Most wires need no help from this side (shared memory, RDMA, NVLink), and a spinning thread could use
    /// the core that a peer on the same host needs for its copies. So the thread sleeps from the beginning,
    /// for short times. Meanwhile the buffers of sockets hold the data.
    pub(super) fn expect(&mut self, now: Instant) -> Wait {
        match self.wait(false, now) {
            Wait::Spin | Wait::Yield => {
                self.slept = true;
                Wait::Sleep(NAP)
            }
            sleep @ Wait::Sleep(_) => sleep,
        }
    }

    /// Returns the minimum duration of a library call that counts as movement.
    pub(super) fn busy(&self) -> Duration {
        if self.slept { BUSY_COLD } else { BUSY }
    }
}

/// The thread spins for this time. A 64 KiB write takes 4 µs within a host and 31 µs over TCP.
const SPIN: Duration = Duration::from_micros(30);
/// If nothing has moved for this time, the thread sleeps instead of yielding. The time is a round trip in a
/// data centre, plus a scheduler's delay.
const YIELD: Duration = Duration::from_micros(500);
/// The first sleep. With the kernel's timer slack, this sleep takes about 100 µs. At 5 GB/s, 0.5 MB arrive in
/// this time, and the buffers of sockets hold them. Each wake costs 5 to 20 µs of a core.
const NAP: Duration = Duration::from_micros(50);
/// If nothing has moved for this time, the sleeps become longer. A peer usually posts a write as soon as it has
/// announced the write. If nothing comes for this time, something delays the peer, and frequent polls do not
/// help.
const DOZE: Duration = Duration::from_millis(5);
const SHORT: Duration = Duration::from_micros(200);
/// If nothing has moved for this time, the sleeps have the longest duration. A peer that is silent for so long
/// either writes without this side's help (shared memory, RDMA), or has stopped.
const DROWSE: Duration = Duration::from_millis(50);
/// The longest sleep. Polls at this interval use about 3 % of a core, and add at most 2 % to the delay of a
/// late write.
const LONG: Duration = Duration::from_millis(1);

/// Minimum duration of a library call that has moved bytes; an idle call takes under 1 µs.
const BUSY: Duration = Duration::from_micros(4);
/// As [`BUSY`], for the first call after a sleep. The caches are then cold, and an idle call takes up to 15 µs
/// on a busy machine. If bytes have come during the sleep, the call that moves them takes longer than this
/// time, even at a rate of only 1 GB/s.
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
        // Bytes came, so the next bytes are expected at once.
        assert_eq!(backoff.wait(true, later), Wait::Spin);
    }
}
