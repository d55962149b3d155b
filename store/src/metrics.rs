//! The Prometheus metrics.

use std::fmt::Write as _;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, LabelValueEncoder,
};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::cache::Cache;

macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$of])* $variant,)* }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
                encoder.write_str(match self { $(Self::$variant => $text,)* })
            }
        }
    };
}

label! {
    /// A command of a client.
    Operation {
        /// A value was sent.
        Put = "put",
        /// A value was asked for.
        Get = "get",
        /// The client asked whether there is a value.
        Exist = "exist",
        /// The client asked for a list, which the store does not make.
        List = "list",
        /// The client asked whether the store lives.
        Health = "health",
    }
}

label! {
    /// Result of a command.
    Outcome {
        /// The value was in memory.
        Hit = "hit",
        /// The value was on disk.
        HitOnDisk = "hit_on_disk",
        /// The value was in the remote store.
        HitOnRemote = "hit_on_remote",
        /// There is no such value.
        Miss = "miss",
        /// The life of the value had ended.
        Ended = "expired",
        /// The value on disk could not be read.
        Broken = "broken",
        /// The value was stored.
        Stored = "stored",
        /// The value is too large, has no key, or the command is not implemented.
        Refused = "refused",
    }
}

label! {
    /// Reason for which the store or the network ended a connection.
    Closed {
        /// The address is in no network of `--allow`.
        NotAllowed = "not_allowed",
        /// There were too many connections, and this was the oldest.
        TooMany = "too_many",
        /// The client sent or read too slowly.
        Slow = "slow",
        /// The head of a request was malformed.
        Malformed = "malformed",
        /// The client left within a request.
        Lost = "lost",
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    operation: Operation,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: Closed,
}

/// The counters of a store. A clone counts into the same counters.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    requests: Family<Request, Counter>,
    closed: Family<Reason, Counter>,
    /// Bytes of values that were stored.
    pub put_bytes: Counter,
    /// Bytes of values that were sent to clients.
    pub get_bytes: Counter,
    /// Bytes of the values that are being received or sent.
    pub in_flight: Gauge,
    /// Number of open connections.
    pub connections: Gauge,
}

/// The metrics that the cache itself counts.
#[derive(Debug)]
struct OfCache(Cache);

impl Metrics {
    /// Counts a request.
    pub fn count(&self, operation: Operation, outcome: Outcome) {
        let labels = Request { operation, outcome };
        self.requests.get_or_create(&labels).inc();
    }

    /// Counts a connection that was ended, and returns the number of connections that ended for this reason.
    pub fn closed(&self, reason: Closed) -> u64 {
        let counter = self.closed.get_or_create(&Reason { reason });
        counter.inc() + 1
    }

    /// Makes a registry with these metrics and the cache's.
    pub fn registry(&self, cache: Cache) -> Arc<Registry> {
        let mut registry = Registry::with_prefix("pd_store");
        let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "Version of the binary", version);
        registry.register(
            "requests",
            "Requests of clients, by command and result",
            self.requests.clone(),
        );
        registry.register(
            "connections_closed",
            "Connections that the store or the network ended, by reason",
            self.closed.clone(),
        );
        registry.register_with_unit("put", "Values stored", Unit::Bytes, self.put_bytes.clone());
        registry.register_with_unit(
            "get",
            "Values sent to clients",
            Unit::Bytes,
            self.get_bytes.clone(),
        );
        registry.register_with_unit(
            "in_flight",
            "Values that are being received or sent",
            Unit::Bytes,
            self.in_flight.clone(),
        );
        registry.register("connections", "Open connections", self.connections.clone());
        if let Some(remote) = cache.remote() {
            remote.register(&mut registry);
        }
        registry.register_collector(Box::new(OfCache(cache)));
        Arc::new(registry)
    }
}

impl Collector for OfCache {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        let memory = ConstGauge::new(i64::try_from(self.0.memory_bytes()).unwrap_or(i64::MAX));
        let (written, read) = self.0.disk_bytes();
        let bytes = Some(&Unit::Bytes);
        memory.encode(encoder.encode_descriptor(
            "memory",
            "Values in memory",
            bytes,
            memory.metric_type(),
        )?)?;
        for (name, help, count) in [
            ("disk_written", "Written to disk since the start", written),
            ("disk_read", "Read from disk since the start", read),
        ] {
            let counter = ConstCounter::new(count);
            counter.encode(encoder.encode_descriptor(
                name,
                help,
                bytes,
                counter.metric_type(),
            )?)?;
        }
        Ok(())
    }
}

/// Returns the values of all metrics in OpenMetrics' text format.
pub fn text(registry: &Registry) -> String {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)
        .expect("a String takes every write");
    text
}

/// Content type of [`text`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
