//! Writes out the Prometheus metrics. docs/reference/metrics.md lists each metric, and a test compares that
//! list with the metrics.
//!
//! Each component owns its counters and histograms and registers them in this registry. Gauges are read
//! from [`Status`] at each scrape. Every label has a bounded number of values: only the first peers are
//! shown.

mod gauges;

use std::sync::Arc;

use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use protocol::VERSION;

use crate::net::malformed::MalformedFrames;
use crate::observe::registration::ProxyMetrics;
use crate::observe::status::Status;
use crate::rank::metrics::RankMetrics;
use gauges::Gauges;

/// The metrics of the components, and the registry that writes them out.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    /// The metrics of the ranks.
    pub(crate) ranks: Arc<RankMetrics>,
    /// The metrics of the exchange with the proxy.
    pub(crate) proxy: ProxyMetrics,
    /// Frames that were not valid messages, at all ports.
    pub(crate) malformed: MalformedFrames,
}

impl Metrics {
    /// Makes and registers the metrics of every component.
    pub(crate) fn new(status: &Arc<Status>) -> Self {
        let malformed = MalformedFrames::default();
        let ranks = RankMetrics::new(&status.about().roles, malformed.clone());
        let proxy = ProxyMetrics::default();
        let mut registry = Registry::with_prefix("pd_sidecar");
        let info = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("protocol", VERSION.to_string()),
            ("role", status.about().role.to_owned()),
        ];
        registry.register(
            "build",
            "Version of the binary and of the protocol",
            Info::new(info.to_vec()),
        );
        ranks.register(&mut registry);
        malformed.register(&mut registry);
        proxy.register(&mut registry);
        // Gauges need no update at each event, because the collector reads them from the status at each
        // scrape.
        registry.register_collector(Box::new(Gauges(Arc::clone(status))));
        Self {
            registry,
            ranks: Arc::new(ranks),
            proxy,
            malformed,
        }
    }

    /// Returns the values of all metrics in OpenMetrics' text format.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)
            .expect("a String takes every write");
        text
    }
}

/// Content type of [`Metrics::text`].
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[cfg(test)]
mod tests;
