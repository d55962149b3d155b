//! Metrics of the spans for the collector.

use prometheus_client::registry::Registry;

use super::{Counters, Metrics};
use crate::telemetry::labels::Labels;

/// Metrics of the spans for the collector.
pub(super) struct Spans {
    spans: Counters<1>,
}

impl Spans {
    /// Registers the metrics, at zero.
    pub(super) fn register(r: &mut Registry) -> Self {
        let spans = Counters::default();
        r.register("spans", "Spans for the collector", spans.clone());
        Self { spans }
    }
}

impl Metrics {
    /// Counts spans that were sent, failed or dropped.
    pub fn spans(&self, result: &'static str, count: usize) {
        let labels = Labels([("result", result)]);
        self.spans.spans.get_or_create(&labels).inc_by(count as u64);
    }
}
