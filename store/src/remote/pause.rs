//! The decision when a backend that fails is asked again. Pure: the time is a parameter.

use std::time::{Duration, Instant};

/// The state of one direction, reads or writes. A full backend refuses writes and still answers reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// The backend is asked. `failures` of the last requests failed, without a success between them.
    Closed { failures: u32 },
    /// The backend is not asked before `until`. Then one request tries it.
    Open {
        until: Instant,
        pause: Duration,
        trying: bool,
    },
}

impl Default for Pause {
    fn default() -> Self {
        Self::Closed { failures: 0 }
    }
}

impl Pause {
    /// Returns true if a request may be sent now. After a pause only one request may, until its result is known or
    /// `bound` has passed.
    pub(super) fn may_ask(&mut self, now: Instant, bound: Duration) -> bool {
        match self {
            Self::Closed { .. } => true,
            Self::Open { until, trying, .. } if now >= *until => {
                // If the request is dropped without a result, the next one tries.
                *until = now + bound;
                *trying = true;
                true
            }
            Self::Open { .. } => false,
        }
    }

    /// Notes a success. Returns true if it ended a pause.
    pub(super) fn succeeded(&mut self) -> bool {
        let ended = matches!(self, Self::Open { .. });
        *self = Self::default();
        ended
    }

    /// Notes a failure. Returns true if it began a pause.
    pub(super) fn failed(&mut self, now: Instant) -> bool {
        match self {
            Self::Closed { failures } if *failures + 1 < FAILURES => {
                *failures += 1;
                false
            }
            Self::Closed { .. } => {
                *self = Self::Open {
                    until: now + SHORTEST,
                    pause: SHORTEST,
                    trying: false,
                };
                true
            }
            Self::Open { pause, trying, .. } => {
                // Requests that were sent before the pause fail late. They say nothing new.
                if *trying {
                    let longer = (*pause * 2).min(LONGEST);
                    *self = Self::Open {
                        until: now + longer,
                        pause: longer,
                        trying: false,
                    };
                }
                false
            }
        }
    }

    /// Returns true if a request would not be sent now.
    pub(super) fn refuses(&self, now: Instant) -> bool {
        matches!(self, Self::Open { until, .. } if now < *until)
    }
}

/// Failures in a row that begin a pause. One lost connection is no reason for one.
const FAILURES: u32 = 3;
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_secs(1);

    #[test]
    fn three_failures_in_a_row_begin_a_pause_and_one_success_ends_it() {
        let now = Instant::now();
        let mut pause = Pause::default();
        assert!(!pause.failed(now) && !pause.failed(now));
        pause.succeeded();
        assert!(!pause.failed(now) && !pause.failed(now) && pause.failed(now));
        assert!(!pause.may_ask(now, BOUND));
        assert!(pause.may_ask(now + SHORTEST, BOUND));
        assert!(
            !pause.may_ask(now + SHORTEST, BOUND),
            "only one request tries"
        );
        assert!(pause.succeeded());
        assert!(pause.may_ask(now, BOUND));
    }

    #[test]
    fn each_failed_try_doubles_the_pause_up_to_a_bound() {
        let mut now = Instant::now();
        let mut pause = Pause::default();
        (0..FAILURES).for_each(|_| {
            pause.failed(now);
        });
        // Requests from before the pause change nothing.
        pause.failed(now);
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert!(!pause.may_ask(now + Duration::from_millis(seconds * 1000 - 1), BOUND));
            now += Duration::from_secs(seconds);
            assert!(pause.may_ask(now, BOUND), "{seconds}");
            pause.failed(now);
        }
    }

    #[test]
    fn a_try_without_a_result_is_followed_by_another() {
        let now = Instant::now();
        let mut pause = Pause::default();
        (0..FAILURES).for_each(|_| {
            pause.failed(now);
        });
        assert!(pause.may_ask(now + SHORTEST, BOUND));
        assert!(pause.may_ask(now + SHORTEST + BOUND, BOUND));
    }
}
