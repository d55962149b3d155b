//! Which requests get a prefill leg at all.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::routing::policy::Candidate;

/// Which requests get a prefill leg.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Every request that can.
    #[default]
    Pd,
    /// The first turn of a conversation; later turns go straight to the decode instance that has it.
    Ppd,
    /// Those that are expected to be done sooner with one.
    Auto,
}

/// The mode, which can be changed while requests run.
#[derive(Debug, Default)]
pub(crate) struct CurrentMode(AtomicU8);

/// What `auto` compares with, as measured so far.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Costs {
    /// Computing one token of a prompt, µs.
    pub prefill_us_per_token: f64,
    /// What a transfer adds to the prefill instance's own time: the second leg, its scheduling, the
    /// move of the KV. µs.
    pub hand_over_us: f64,
}

/// The costs, learned from requests.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Bits of the `f64`s of [`Costs`].
    prefill: AtomicU64,
    hand_over: AtomicU64,
}

/// The name of no mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a mode: pd, ppd or auto")]
pub struct NoMode(String);

impl Mode {
    /// Every mode, in the order of their numbers.
    const ALL: [Self; 3] = [Self::Pd, Self::Ppd, Self::Auto];

    /// The name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pd => "pd",
            Self::Ppd => "ppd",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Mode {
    type Err = NoMode;

    fn from_str(text: &str) -> Result<Self, NoMode> {
        let all = Self::ALL.into_iter();
        all.into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| NoMode(text.chars().take(20).collect()))
    }
}

impl CurrentMode {
    /// The mode now.
    pub(crate) fn get(&self) -> Mode {
        Mode::ALL[usize::from(self.0.load(Ordering::Relaxed)) % Mode::ALL.len()]
    }

    /// Changes it for requests that come from now on.
    pub(crate) fn set(&self, mode: Mode) {
        self.0.store(mode as u8, Ordering::Relaxed);
    }
}

impl Costs {
    /// Whether the decode instance alone is expected to be done sooner.
    ///
    /// Computing beside `legs` running requests delays each of them, which is what prefill instances
    /// are there to avoid: every four of them make local computing as dear again.
    pub(crate) fn alone_is_cheaper(
        &self,
        prompt_tokens: u64,
        decode: &Candidate<'_>,
        prefill: &Candidate<'_>,
    ) -> bool {
        let us = |tokens: u64| tokens as f64 * self.prefill_us_per_token;
        let disturbed = 1.0 + f64::from(decode.load.legs) / 4.0;
        let here = us(prompt_tokens.saturating_sub(decode.held)) * disturbed;
        let queued = prefill.load.tokens;
        let there = us(queued + prompt_tokens.saturating_sub(prefill.held)) + self.hand_over_us;
        here <= there
    }
}

impl Default for Measured {
    /// Before anything is measured: a large model on a large GPU, and a hand-over within a host.
    fn default() -> Self {
        Self {
            prefill: AtomicU64::new(50.0_f64.to_bits()),
            hand_over: AtomicU64::new(20_000.0_f64.to_bits()),
        }
    }
}

impl Measured {
    /// The costs now.
    pub(crate) fn costs(&self) -> Costs {
        Costs {
            prefill_us_per_token: f64::from_bits(self.prefill.load(Ordering::Relaxed)),
            hand_over_us: f64::from_bits(self.hand_over.load(Ordering::Relaxed)),
        }
    }

    /// A prefill leg took so long for so many tokens that were not cached. Short ones say more about
    /// the engine's overhead than about its speed, and are not counted.
    pub(crate) fn prefilled(&self, tokens: u64, time: Duration) {
        if tokens >= LEAST_TOKENS {
            learn(&self.prefill, micros(time) / tokens as f64);
        }
    }

    /// The first byte came so long after the prefill leg's end.
    pub(crate) fn handed_over(&self, time: Duration) {
        learn(&self.hand_over, micros(time));
    }
}

impl Measured {
    /// A request stayed away from the prefill instances because of these costs. What is never tried is
    /// never measured: the hand-over looks a little cheaper each time, until one request tries it again.
    pub(crate) fn stayed(&self) {
        let before = f64::from_bits(self.hand_over.load(Ordering::Relaxed));
        let after = before * (1.0 - FORGETTING);
        self.hand_over.store(after.to_bits(), Ordering::Relaxed);
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Moves an average an eighth of the way. Two requests at once may lose one step: it is an average.
fn learn(average: &AtomicU64, value: f64) {
    let before = f64::from_bits(average.load(Ordering::Relaxed));
    let after = before + (value - before) / 8.0;
    average.store(after.to_bits(), Ordering::Relaxed);
}

/// A hand-over that looks twice as dear as it is is tried again after 140 requests.
const FORGETTING: f64 = 0.005;

/// Prompts that say something about speed.
const LEAST_TOKENS: u64 = 64;

#[cfg(test)]
mod tests;
