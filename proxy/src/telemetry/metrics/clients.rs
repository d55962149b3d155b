//! Metrics of client connections and uploads.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::Metrics;

/// Metrics of client connections and uploads.
pub(super) struct Clients {
    connections: Gauge,
    uploads: Gauge,
    idle_closed: Counter,
}

/// An open client connection in the metric. Dropping the value subtracts the connection from the metric.
#[derive(Debug)]
pub(crate) struct Connected(Gauge);

impl Clients {
    /// Registers the metrics, at zero.
    pub(super) fn register(r: &mut Registry) -> Self {
        let all = Self {
            connections: Gauge::default(),
            uploads: Gauge::default(),
            idle_closed: Counter::default(),
        };
        r.register(
            "connections",
            "Client connections, idle ones included",
            all.connections.clone(),
        );
        r.register(
            "uploads",
            "Request bodies that are being received",
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
    /// Counts a client connection until the returned value is dropped.
    pub(crate) fn connected(&self) -> Connected {
        self.clients.connections.inc();
        Connected(self.clients.connections.clone())
    }

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

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.dec();
    }
}
