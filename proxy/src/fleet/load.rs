//! The load of an instance as this proxy counts it, and the circuit breaker for an instance that keeps
//! failing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One instance's load and failures. A heartbeat of the instance does not reset the counters.
#[derive(Debug)]
pub struct Load {
    /// Tokens of the legs in flight: prompts, and for decode legs also the tokens that may be generated.
    tokens: AtomicU64,
    /// Number of legs in flight.
    legs: AtomicU32,
    /// Number of legs that failed since the last success.
    failures: AtomicU32,
    /// End of the pause in which the instance gets no requests, in microseconds since `born`; 0 without
    /// a pause.
    open_until: AtomicU64,
    /// True from a stall (legs in flight and no sign of work) until the next success.
    is_stalled: AtomicBool,
    /// Time at which a leg last received data, in microseconds since `born`; 0 if no leg has received
    /// data.
    heard: AtomicU64,
    /// Time of the first `/health` failure since the last success of `/health`, in microseconds since
    /// `born`; 0 if there is none.
    sick: AtomicU64,
    /// Time of the first `/health` answer with an error since the last success, in microseconds since
    /// `born`; 0 if there is none. Such an answer says that the engine is dead, while a late answer may
    /// come from a busy engine.
    dead: AtomicU64,
    /// Time from which the fields in microseconds are counted.
    born: Instant,
    /// Number of legs that were answered; `answered_us` is the sum of their times to the first byte, in
    /// microseconds.
    answered: AtomicU64,
    answered_us: AtomicU64,
    /// Number of legs whose failure was the instance's fault.
    failed: AtomicU64,
}

/// The load of an instance at one moment, for routing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// Tokens of the legs in flight.
    pub tokens: u64,
    /// Number of legs in flight.
    pub legs: u32,
    /// True while the circuit breaker is open: the instance keeps failing and gets no requests.
    pub is_open: bool,
}

/// Counters of an instance's finished legs, for metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Done {
    /// Number of legs that were answered.
    pub answered: u64,
    /// Sum of the times to the first byte, in seconds.
    pub seconds: f64,
    /// Number of legs whose failure was the instance's fault.
    pub failed: u64,
}

/// Settings of the circuit breaker for instances that keep failing.
#[derive(Clone, Copy, Debug)]
pub struct Breaker {
    /// Failures in a row that open the breaker.
    pub failures: u32,
    /// Time for which the breaker then stays open. After this pause one request probes the instance.
    pub pause: Duration,
    /// A probing request counts as stalled if the instance has shown no sign of work for this time.
    pub stall: Duration,
}

/// The result of asking an engine's `/health`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    Good,
    /// The HTTP server answers that the engine is dead.
    Dead,
    /// No answer came in time, or the server cannot be reached.
    Unknown,
}

/// One leg's part of an instance's load. Dropping the guard subtracts the part again.
#[derive(Debug)]
pub struct LoadGuard {
    load: Arc<Load>,
    tokens: u64,
}

/// Time after which an engine is dead whose `/health` keeps saying so. A request that reaches vLLM's server
/// in the moment in which the engine dies gets no answer and no error, so only `/health` shows its end.
pub(crate) const DEAD_AFTER: Duration = Duration::from_secs(2);

/// Time between two looks at whether the engine of a waiting request is dead.
pub(crate) const DEAD_LOOK: Duration = Duration::from_secs(1);

impl Default for Load {
    fn default() -> Self {
        Self {
            tokens: AtomicU64::new(0),
            legs: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            open_until: AtomicU64::new(0),
            is_stalled: AtomicBool::new(false),
            heard: AtomicU64::new(0),
            sick: AtomicU64::new(0),
            dead: AtomicU64::new(0),
            born: Instant::now(),
            answered: AtomicU64::new(0),
            answered_us: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }
}

impl Load {
    /// Adds a leg with this number of tokens to the load, until the guard is dropped.
    pub fn charge(self: &Arc<Self>, tokens: u64) -> LoadGuard {
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
        self.legs.fetch_add(1, Ordering::Relaxed);
        LoadGuard {
            load: Arc::clone(self),
            tokens,
        }
    }

    /// Returns the load for routing.
    pub fn snapshot(&self, now: Instant) -> LoadSnapshot {
        LoadSnapshot {
            tokens: self.tokens.load(Ordering::Relaxed),
            legs: self.legs.load(Ordering::Relaxed),
            is_open: self.open_until.load(Ordering::Relaxed) > self.since_born(now),
        }
    }

    /// Returns the counters for metrics.
    pub fn done(&self) -> Done {
        Done {
            answered: self.answered.load(Ordering::Relaxed),
            seconds: self.answered_us.load(Ordering::Relaxed) as f64 / 1e6,
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    /// Records that a leg got its answer, and closes the breaker. `after` is the time since the leg's
    /// start.
    pub fn succeeded(&self, after: Duration) {
        let us = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        self.answered.fetch_add(1, Ordering::Relaxed);
        self.answered_us.fetch_add(us, Ordering::Relaxed);
        self.failures.store(0, Ordering::Relaxed);
        self.is_stalled.store(false, Ordering::Relaxed);
        self.open_until.store(0, Ordering::Relaxed);
        self.heard(Instant::now());
    }

    /// Records that a leg has received data, which proves that the engine works.
    pub fn heard(&self, now: Instant) {
        self.heard
            .fetch_max(self.since_born(now), Ordering::Relaxed);
    }

    /// Returns the time of the last sign of work; `None` if there was none.
    pub fn last_heard(&self) -> Option<Instant> {
        let us = self.heard.load(Ordering::Relaxed);
        (us > 0).then(|| self.born + Duration::from_micros(us))
    }

    /// Records a result of asking the engine's `/health`.
    pub fn checked(&self, now: Instant, health: Health) {
        let since = self.since_born(now);
        // Only the first failure in a row sets the time. Two concurrent failures may both set it; their
        // times are almost equal.
        let keep_first = |time: &AtomicU64| {
            if time.load(Ordering::Relaxed) == 0 {
                time.store(since, Ordering::Relaxed);
            }
        };
        match health {
            Health::Good => {
                self.sick.store(0, Ordering::Relaxed);
                self.dead.store(0, Ordering::Relaxed);
            }
            Health::Dead => {
                keep_first(&self.sick);
                keep_first(&self.dead);
            }
            Health::Unknown => keep_first(&self.sick),
        }
    }

    /// Returns true if the engine is dead: it has shown no sign of work since `silent_since`, and since
    /// then its `/health` has failed for at least `limit`, or has said for `DEAD_AFTER` that the engine is
    /// dead.
    pub fn is_dead(&self, now: Instant, silent_since: Instant, limit: Duration) -> bool {
        let has_lasted = |since: &AtomicU64, time: Duration| {
            let since = since.load(Ordering::Relaxed);
            let at = self.born + Duration::from_micros(since);
            since > 0 && at.max(silent_since) + time <= now
        };
        has_lasted(&self.sick, limit) || has_lasted(&self.dead, limit.min(DEAD_AFTER))
    }

    /// Records that the instance has legs in flight and shows no sign of work, and opens the breaker.
    /// Returns true if the instance was not stalled before.
    pub fn stalled(&self, now: Instant, breaker: Breaker) -> bool {
        let is_new = !self.is_stalled.swap(true, Ordering::Relaxed);
        self.failed.fetch_add(u64::from(is_new), Ordering::Relaxed);
        self.failures.fetch_max(breaker.failures, Ordering::Relaxed);
        self.open(now, breaker);
        is_new
    }

    /// Records a leg whose failure was the instance's fault. Returns true if this failure opens the
    /// breaker.
    pub fn failed(&self, now: Instant, breaker: Breaker) -> bool {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let failures = self
            .failures
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1);
        if failures < breaker.failures {
            return false;
        }
        self.open(now, breaker);
        failures == breaker.failures
    }

    /// Records that routing chose the instance. If the instance had failed too often, the breaker opens
    /// again, so that this request alone probes the instance.
    pub fn chosen(&self, now: Instant, breaker: Breaker) {
        if self.failures.load(Ordering::Relaxed) >= breaker.failures {
            self.open(now, breaker);
        }
    }

    /// Opens the breaker: no request goes to the instance until the pause ends.
    fn open(&self, now: Instant, breaker: Breaker) {
        // While one request probes a stalled instance, no second request may go to the instance, because the
        // second request would probably stall, too.
        let pause = if self.is_stalled.load(Ordering::Relaxed) {
            breaker.pause.max(breaker.stall)
        } else {
            breaker.pause
        };
        self.open_until
            .store(self.since_born(now + pause), Ordering::Relaxed);
    }

    /// Returns the microseconds from `born` to `at`.
    fn since_born(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.born);
        // The result is at least 1, because 0 means "never".
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX).max(1)
    }
}

impl LoadGuard {
    /// Returns the load that contains the leg's part.
    pub fn load(&self) -> &Load {
        &self.load
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.load.tokens.fetch_sub(self.tokens, Ordering::Relaxed);
        self.load.legs.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
