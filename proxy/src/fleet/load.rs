//! What an instance is busy with, as this proxy knows it, and whether it fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One instance's load and failures. It stays with the instance through its heartbeats.
#[derive(Debug)]
pub struct Load {
    /// Tokens of requests under way: prompts, and for decode legs what may be generated.
    tokens: AtomicU64,
    /// Legs under way.
    legs: AtomicU32,
    /// Legs that failed since one has not.
    failures: AtomicU32,
    /// Until when it gets nothing, microseconds since `born`.
    open_until: AtomicU64,
    /// It was left because it showed no sign of work, and has shown none since.
    is_stalled: AtomicBool,
    /// When one of its legs last brought something, microseconds since `born`.
    heard: AtomicU64,
    /// Since when its `/health` fails, likewise; 0 if it does not.
    sick: AtomicU64,
    born: Instant,
    /// Legs that were answered, and how long that took in all, microseconds.
    answered: AtomicU64,
    answered_us: AtomicU64,
    /// Legs that failed by its fault.
    failed: AtomicU64,
}

/// How busy an instance is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// Tokens of its requests under way.
    pub tokens: u64,
    /// Legs under way.
    pub legs: u32,
    /// It keeps failing and is left alone for a while.
    pub is_open: bool,
}

/// What an instance has done so far, for metrics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Done {
    /// Legs that were answered.
    pub answered: u64,
    /// How long that took in all, to the first byte.
    pub seconds: f64,
    /// Legs that failed by its fault.
    pub failed: u64,
}

/// When an instance that keeps failing gets no requests, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Breaker {
    /// Failures in a row.
    pub failures: u32,
    /// Then nothing for so long; afterwards one request tries.
    pub pause: Duration,
    /// The longest that a request which tries is without a sign of work.
    pub stall: Duration,
}

/// One leg's share of a load; gone when dropped.
#[derive(Debug)]
pub struct LoadGuard {
    load: Arc<Load>,
    tokens: u64,
}

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
            born: Instant::now(),
            answered: AtomicU64::new(0),
            answered_us: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }
}

impl Load {
    /// Adds a leg.
    pub fn charge(self: &Arc<Self>, tokens: u64) -> LoadGuard {
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
        self.legs.fetch_add(1, Ordering::Relaxed);
        LoadGuard {
            load: Arc::clone(self),
            tokens,
        }
    }

    /// What routing reads.
    pub fn snapshot(&self, now: Instant) -> LoadSnapshot {
        LoadSnapshot {
            tokens: self.tokens.load(Ordering::Relaxed),
            legs: self.legs.load(Ordering::Relaxed),
            is_open: self.open_until.load(Ordering::Relaxed) > self.since_born(now),
        }
    }

    /// What it has done so far.
    pub fn done(&self) -> Done {
        Done {
            answered: self.answered.load(Ordering::Relaxed),
            seconds: self.answered_us.load(Ordering::Relaxed) as f64 / 1e6,
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    /// A leg was answered, so long after it was sent.
    pub fn succeeded(&self, after: Duration) {
        let us = u64::try_from(after.as_micros()).unwrap_or(u64::MAX);
        self.answered.fetch_add(1, Ordering::Relaxed);
        self.answered_us.fetch_add(us, Ordering::Relaxed);
        self.failures.store(0, Ordering::Relaxed);
        self.is_stalled.store(false, Ordering::Relaxed);
        self.open_until.store(0, Ordering::Relaxed);
        self.heard(Instant::now());
    }

    /// A leg has brought something: the engine works.
    pub fn heard(&self, now: Instant) {
        self.heard
            .fetch_max(self.since_born(now), Ordering::Relaxed);
    }

    /// When it last showed a sign of work; `None` if it never has.
    pub fn last_heard(&self) -> Option<Instant> {
        let us = self.heard.load(Ordering::Relaxed);
        (us > 0).then(|| self.born + Duration::from_micros(us))
    }

    /// Its engine's `/health` has answered well, or not.
    pub fn checked(&self, now: Instant, is_healthy: bool) {
        if is_healthy {
            self.sick.store(0, Ordering::Relaxed);
            return;
        }
        // Only the first failure of a row counts; the order of two at once makes no difference.
        let first = self.sick.load(Ordering::Relaxed) == 0;
        if first {
            self.sick.store(self.since_born(now), Ordering::Relaxed);
        }
    }

    /// Its `/health` has failed for at least so long.
    pub fn is_sick_for(&self, now: Instant, time: Duration) -> bool {
        let since = self.sick.load(Ordering::Relaxed);
        since > 0 && self.born + Duration::from_micros(since) + time <= now
    }

    /// It has legs and shows no sign of work: it gets nothing for a while. Returns whether it got
    /// something until now.
    pub fn stalled(&self, now: Instant, breaker: Breaker) -> bool {
        let is_new = !self.is_stalled.swap(true, Ordering::Relaxed);
        self.failed.fetch_add(u64::from(is_new), Ordering::Relaxed);
        self.failures.fetch_max(breaker.failures, Ordering::Relaxed);
        self.open(now, breaker);
        is_new
    }

    /// A leg failed by the instance's fault. Returns whether it gets nothing from now on.
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

    /// It has been chosen: if it had failed too often, this request alone tries.
    pub fn chosen(&self, now: Instant, breaker: Breaker) {
        if self.failures.load(Ordering::Relaxed) >= breaker.failures {
            self.open(now, breaker);
        }
    }

    fn open(&self, now: Instant, breaker: Breaker) {
        // As long as one request tries a stalled instance, the next one does not.
        let pause = if self.is_stalled.load(Ordering::Relaxed) {
            breaker.pause.max(breaker.stall)
        } else {
            breaker.pause
        };
        self.open_until
            .store(self.since_born(now + pause), Ordering::Relaxed);
    }

    fn since_born(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.born);
        // The first microsecond counts as one, so that 0 means "never".
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX).max(1)
    }
}

impl LoadGuard {
    /// The load that it is part of.
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
