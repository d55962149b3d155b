//! Times of the prefill legs since the start, with the statistics that LMCache's example proxy prints.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Times of prefill legs. After 65536 legs, only a random sample of the times is kept.
#[derive(Debug, Default)]
pub(crate) struct PrefillTimes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    count: u64,
    seconds: f64,
    sample: Vec<f32>,
}

/// Statistics of prefill legs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    /// The number of legs.
    pub count: u64,
    /// The mean time, in milliseconds.
    pub mean_ms: f64,
    /// The median of the sampled times, in milliseconds.
    pub median_ms: f64,
    /// The 99th percentile of the sampled times, in milliseconds.
    pub p99_ms: f64,
}

impl PrefillTimes {
    /// Adds the time from a request's arrival to the answer of its prefill leg.
    pub(crate) fn add(&self, time: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.count += 1;
        state.seconds += time.as_secs_f64();
        if state.sample.len() < SAMPLE {
            state.sample.push(time.as_secs_f32());
            return;
        }
        // Reservoir sampling: each leg so far is in the sample with the same probability.
        let at = rand::random_range(0..state.count);
        if let Some(place) = usize::try_from(at)
            .ok()
            .and_then(|at| state.sample.get_mut(at))
        {
            *place = time.as_secs_f32();
        }
    }

    /// Returns the statistics so far; `None` if no prefill leg was answered.
    pub(crate) fn summary(&self) -> Option<Summary> {
        let (count, seconds, mut sample) = {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.count, state.seconds, state.sample.clone())
        };
        sample.sort_unstable_by(f32::total_cmp);
        let at = |part: usize| {
            let place = (sample.len() * part / 100).min(sample.len().saturating_sub(1));
            sample.get(place).map(|seconds| f64::from(*seconds) * 1e3)
        };
        Some(Summary {
            count,
            mean_ms: seconds * 1e3 / count as f64,
            median_ms: at(50)?,
            p99_ms: at(99)?,
        })
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} prefill legs: mean {:.3} ms, median {:.3} ms, p99 {:.3} ms",
            self.count, self.mean_ms, self.median_ms, self.p99_ms
        )
    }
}

/// Maximum number of times in the sample, which then takes 256 KiB.
const SAMPLE: usize = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures() {
        let times = PrefillTimes::default();
        assert_eq!(times.summary(), None);
        for ms in 1..=100 {
            times.add(Duration::from_millis(ms));
        }
        let text = times.summary().unwrap().to_string();
        assert_eq!(
            text,
            "100 prefill legs: mean 50.500 ms, median 51.000 ms, p99 100.000 ms"
        );
        for _ in 0..SAMPLE * 2 {
            times.add(Duration::from_millis(7));
        }
        let after = times.summary().unwrap();
        assert_eq!(
            (after.count, after.median_ms.round()),
            (100 + 2 * SAMPLE as u64, 7.0)
        );
        assert_eq!(times.state.lock().unwrap().sample.len(), SAMPLE);
    }
}
