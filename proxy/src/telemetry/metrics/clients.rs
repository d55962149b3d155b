//! Metrics of client connections and uploads.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::Metrics;

/// Metrics of client connections and uploads.
pub(super) struct Clients {
    uploads: Gauge,
    idle_closed: Counter,
}

impl Clients {
    /// Registers the metrics, at zero.
    pub(super) fn register(r: &mut Registry) -> Self {
        let all = Self {
            uploads: Gauge::default(),
            idle_closed: Counter::default(),
        };
        r.register(
            "uploads",
            "Request bodies on their way in",
            all.uploads.clone(),
        );
        r.register(
            "idle_connections_closed",
            "Idle client connections closed to make room for others",
            all.idle_closed.clone(),
        );
        all
    }
}

impl Metrics {
    /// Sets the number of request bodies that are being received.
    pub fn show_uploads(&self, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.clients.uploads.set(count);
    }

    /// Counts an idle client connection that was closed to make room.
    pub fn idle_closed(&self) {
        self.clients.idle_closed.inc();
    }
}
