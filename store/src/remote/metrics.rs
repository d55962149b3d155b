//! The counters of a remote store.

use std::fmt::Write as _;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// A request to the remote store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Operation {
    Get,
    Put,
}

/// Result of a request to the remote store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    /// A value came.
    Hit,
    /// There is no such value.
    Miss,
    /// The life of the value had ended.
    Ended,
    /// The value is torn, changed, or another key's. It was not used.
    Broken,
    /// A value was put.
    Stored,
    /// The remote store answered with an error, or could not be reached.
    Failed,
    /// The remote store did not answer in time.
    TimedOut,
    /// The remote store was not asked, because it has failed a moment ago.
    Skipped,
    /// Too many requests were on their way (get), or too many bytes waited (put).
    Full,
}

/// A clone counts into the same counters.
#[derive(Clone, Debug, Default)]
pub(super) struct Metrics {
    requests: Family<Labels, Counter>,
    pub(super) put_bytes: Counter,
    pub(super) get_bytes: Counter,
    /// Bytes of values that wait to be put.
    pub(super) waiting: Gauge,
    away: Family<Direction, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    operation: Operation,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Direction {
    operation: Operation,
}

impl Metrics {
    pub(super) fn count(&self, operation: Operation, outcome: Outcome) {
        let labels = Labels { operation, outcome };
        self.requests.get_or_create(&labels).inc();
    }

    pub(super) fn set_away(&self, operation: Operation, away: bool) {
        let gauge = self.away.get_or_create(&Direction { operation });
        gauge.set(away.into());
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "remote_requests",
            "Requests to the remote store, by operation and result",
            self.requests.clone(),
        );
        registry.register(
            "remote_away",
            "1 while the remote store is not asked, because it failed",
            self.away.clone(),
        );
        for (name, help, counter) in [
            (
                "remote_put",
                "Values put into the remote store",
                &self.put_bytes,
            ),
            (
                "remote_get",
                "Values that came from the remote store",
                &self.get_bytes,
            ),
        ] {
            registry.register_with_unit(name, help, Unit::Bytes, counter.clone());
        }
        registry.register_with_unit(
            "remote_waiting",
            "Values that wait to be put into the remote store",
            Unit::Bytes,
            self.waiting.clone(),
        );
    }
}

impl EncodeLabelValue for Operation {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(match self {
            Self::Get => "get",
            Self::Put => "put",
        })
    }
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Ended => "expired",
            Self::Broken => "broken",
            Self::Stored => "stored",
            Self::Failed => "failed",
            Self::TimedOut => "timeout",
            Self::Skipped => "skipped",
            Self::Full => "full",
        })
    }
}
