//! What an instance is busy with, as this proxy knows it, and whether it fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::route::Facts;

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
    born: Instant,
    /// Legs that were answered, and how long that took in all, microseconds.
    answered: AtomicU64,
    answered_us: AtomicU64,
    /// Legs that failed by its fault.
    failed: AtomicU64,
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
}

/// One leg's share of a load; gone when dropped.
#[derive(Debug)]
pub struct Charge {
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
            born: Instant::now(),
            answered: AtomicU64::new(0),
            answered_us: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }
}

impl Load {
    /// Adds a leg.
    pub fn charge(self: &Arc<Self>, tokens: u64) -> Charge {
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
        self.legs.fetch_add(1, Ordering::Relaxed);
        Charge {
            load: Arc::clone(self),
            tokens,
        }
    }

    /// What routing reads.
    pub fn facts(&self, now: Instant) -> Facts {
        Facts {
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
        self.open_until.store(0, Ordering::Relaxed);
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
        self.open_until
            .store(self.since_born(now + breaker.pause), Ordering::Relaxed);
    }

    fn since_born(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.born);
        // The first microsecond counts as one, so that 0 means "never".
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX).max(1)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.load.tokens.fetch_sub(self.tokens, Ordering::Relaxed);
        self.load.legs.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
