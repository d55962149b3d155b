//! The modes, which decide which requests get a prefill leg.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use crate::routing::policy::Candidate;

/// The rule that decides which requests get a prefill leg.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Every request that can get a prefill leg.
    #[default]
    Pd,
    /// The first turn of a conversation; later turns go directly to the decode instance that has the
    /// conversation.
    Ppd,
    /// Requests that are expected to finish sooner with a prefill leg.
    Auto,
}

/// The current mode. The mode can change while requests are in flight.
#[derive(Debug, Default)]
pub(crate) struct CurrentMode(AtomicU8);

/// The measured costs that mode `auto` compares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Costs {
    /// Time to compute one token of a prompt, in µs.
    pub prefill_us_per_token: f64,
    /// Time that a transfer adds to the prefill instance's own time, in µs: the second leg, its
    /// scheduling and the move of the KV.
    pub hand_over_us: f64,
}

/// Moving averages of the costs, learned from requests.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Bits of the `f64` values of [`Costs`].
    prefill: AtomicU64,
    hand_over: AtomicU64,
}

/// A text that is not the name of a mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a mode: pd, ppd or auto")]
pub struct NoMode(String);

impl Mode {
    /// All modes, in the order of their numbers.
    const ALL: [Self; 3] = [Self::Pd, Self::Ppd, Self::Auto];

    /// Returns the name of the mode.
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
    /// Returns the current mode.
    pub(crate) fn get(&self) -> Mode {
        Mode::ALL[usize::from(self.0.load(Ordering::Relaxed)) % Mode::ALL.len()]
    }

    /// Changes the mode for requests that come from now on.
    pub(crate) fn set(&self, mode: Mode) {
        self.0.store(mode as u8, Ordering::Relaxed);
    }
}

impl Costs {
    /// Returns true if the decode instance alone is expected to finish sooner.
    ///
    /// A prompt that the decode instance computes delays each running request of this instance. To count
    /// this delay, the cost of the prompt is multiplied by 1 + n / 4, where n is the number of running
    /// requests.
    pub(crate) fn local_is_cheaper(
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
    /// Returns the costs that are used until the first measurement: the prefill cost of a large model on a
    /// large GPU, and the cost of a hand-over within a host.
    fn default() -> Self {
        Self {
            prefill: AtomicU64::new(50.0_f64.to_bits()),
            hand_over: AtomicU64::new(20_000.0_f64.to_bits()),
        }
    }
}

impl Measured {
    /// Returns the current costs.
    pub(crate) fn costs(&self) -> Costs {
        Costs {
            prefill_us_per_token: f64::from_bits(self.prefill.load(Ordering::Relaxed)),
            hand_over_us: f64::from_bits(self.hand_over.load(Ordering::Relaxed)),
        }
    }

    /// Records the time that a prefill leg took for this many tokens that were not cached. Short prompts
    /// are not counted: they measure the engine's overhead rather than its speed.
    pub(crate) fn prefilled(&self, tokens: u64, time: Duration) {
        if tokens >= LEAST_TOKENS {
            learn(&self.prefill, micros(time) / tokens as f64);
        }
    }

    /// Records the time from the prefill leg's end to the first byte of the answer.
    pub(crate) fn handed_over(&self, time: Duration) {
        learn(&self.hand_over, micros(time));
    }
}

impl Measured {
    /// Records that a request got no prefill leg because of the measured costs. Without a hand-over there
    /// is no new measurement. Therefore each call lowers the recorded cost of a hand-over a little, until
    /// a request tries a hand-over again.
    pub(crate) fn stayed(&self) {
        let before = f64::from_bits(self.hand_over.load(Ordering::Relaxed));
        let after = before * (1.0 - FORGETTING);
        self.hand_over.store(after.to_bits(), Ordering::Relaxed);
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Moves an average towards `value` by an eighth of the difference. If two requests change the average
/// at the same time, one of the two changes may be lost. An average tolerates this.
fn learn(average: &AtomicU64, value: f64) {
    let before = f64::from_bits(average.load(Ordering::Relaxed));
    let after = before + (value - before) / 8.0;
    average.store(after.to_bits(), Ordering::Relaxed);
}

/// The recorded cost of a hand-over falls by this share with each request that gets no prefill leg. If the
/// recorded cost is twice the real cost, a request tries a hand-over again after about 140 requests.
const FORGETTING: f64 = 0.005;

/// Minimum length in tokens of a prompt whose prefill time is counted.
const LEAST_TOKENS: u64 = 64;

#[cfg(test)]
mod tests;
