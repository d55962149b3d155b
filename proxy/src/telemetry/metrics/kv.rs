//! Metrics of the engines' KV events.

use prometheus_client::registry::Registry;

use super::{Counters, Metrics, touch};
use crate::telemetry::labels::{KvBatch, Labels};

/// Metrics of the engines' KV events.
pub(super) struct Kv {
    batches: Counters<1>,
}

impl Kv {
    /// Registers the metrics, at zero.
    pub(super) fn register(r: &mut Registry) -> Self {
        let batches = Counters::default();
        r.register("kv_events", "Messages with KV events", batches.clone());
        for result in KvBatch::ALL {
            touch(&batches, Labels([("result", result.as_str())]));
        }
        Self { batches }
    }
}

impl Metrics {
    /// Counts a message with KV events.
    pub fn kv_batch(&self, result: KvBatch) {
        let labels = Labels([("result", result.as_str())]);
        self.kv.batches.get_or_create(&labels).inc();
    }
}
