//! Prometheus metrics. docs/reference/metrics.md lists each metric, and a test compares the two.
//!
//! Counters and histograms are kept here; gauges are read from [`Status`] at each scrape. Every label has a
//! bounded number of values: only the first peers are shown.

mod gauges;

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use protocol::record::Record;
use protocol::{Reason, VERSION};

use crate::observe::status::Status;
use crate::rank::context::RankRole;
use crate::transport::{Kind, table};
use gauges::Gauges;

/// All counters and histograms of the process, and the registry that writes them out.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Ending, Counter>,
    bytes: Family<OnWire, Counter>,
    chunks: Family<OnWire, Counter>,
    tokens: Family<OfRank, Counter>,
    tokens_held: Family<OfRank, Counter>,
    windowed: Family<OfRank, Counter>,
    phases: Family<InPhase, Histogram, fn() -> Histogram>,
    malformed: Family<AtPort, Counter>,
    engines_refused: Family<RefusedEngine, Counter>,
    proxy_messages: Family<ToProxy, Counter>,
    proxy_acknowledgements: Counter,
}

/// The result of sending a message to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DeliveryResult {
    /// The socket took the message.
    Sent,
    /// The message is lost: a queue was full, or no proxy that takes the message was connected.
    Dropped,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfRank {
    side: &'static str,
    rank: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ending {
    side: &'static str,
    rank: u32,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OnWire {
    side: &'static str,
    rank: u32,
    transport: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InPhase {
    side: &'static str,
    rank: u32,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AtPort {
    port: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedEngine {
    side: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ToProxy {
    kind: &'static str,
    fate: &'static str,
}

impl Metrics {
    /// Makes and registers every metric. A series with known labels exists from the start, at 0.
    pub(crate) fn new(status: &Arc<Status>) -> Self {
        let phases: fn() -> Histogram = || Histogram::new(exponential_buckets(50e-6, 2.0, 19));
        let metrics = Self {
            registry: Registry::with_prefix("pd_sidecar"),
            requests: Family::default(),
            bytes: Family::default(),
            chunks: Family::default(),
            tokens: Family::default(),
            tokens_held: Family::default(),
            windowed: Family::default(),
            phases: Family::new_with_constructor(phases),
            malformed: Family::default(),
            engines_refused: Family::default(),
            proxy_messages: Family::default(),
            proxy_acknowledgements: Counter::default(),
        };
        metrics.touch(status);
        metrics.registered(status)
    }

    fn registered(mut self, status: &Arc<Status>) -> Self {
        let r = &mut self.registry;
        // A test compares the name, type and labels of each metric with docs/reference/metrics.md.
        let info = [
            ("version", env!("CARGO_PKG_VERSION").to_owned()),
            ("protocol", VERSION.to_string()),
            ("role", status.about().role.to_owned()),
        ];
        r.register(
            "build",
            "Version of the binary and of the protocol",
            Info::new(info.to_vec()),
        );
        r.register(
            "requests",
            "Requests that have ended, by reason; ok: every wanted chunk arrived",
            self.requests.clone(),
        );
        r.register_with_unit(
            "transferred",
            "KV that was written to receivers, or by senders",
            Unit::Bytes,
            self.bytes.clone(),
        );
        r.register("chunks", "Chunks that were written", self.chunks.clone());
        r.register("tokens", "Tokens of ended requests", self.tokens.clone());
        r.register(
            "tokens_held",
            "Of them, tokens that the decode side held already",
            self.tokens_held.clone(),
        );
        r.register(
            "windowed_chunks",
            "Chunks that waited for a landing slot",
            self.windowed.clone(),
        );
        r.register_with_unit(
            "phase",
            "Time that a request spent in a phase",
            Unit::Seconds,
            self.phases.clone(),
        );
        r.register(
            "malformed_frames",
            "Frames that were no message, by port",
            self.malformed.clone(),
        );
        r.register(
            "engines_refused",
            "Engines that said hello and were refused, by reason",
            self.engines_refused.clone(),
        );
        r.register(
            "proxy_messages",
            "Messages to the proxy, by kind and what became of them",
            self.proxy_messages.clone(),
        );
        r.register(
            "proxy_acknowledgements",
            "Call-backs of the proxy",
            self.proxy_acknowledgements.clone(),
        );
        // Gauges need no update at each event, because the collector reads them from the status at each
        // scrape.
        r.register_collector(Box::new(Gauges(Arc::clone(status))));
        self
    }

    /// Makes the series with known labels, so that a rate over them is 0 and not absent.
    fn touch(&self, status: &Status) {
        for &(side, rank) in &status.about().sides {
            let side = side.as_str();
            let of_rank = OfRank { side, rank };
            drop(self.tokens.get_or_create(&of_rank));
            drop(self.tokens_held.get_or_create(&of_rank));
            drop(self.windowed.get_or_create(&of_rank));
            for reason in Reason::ALL.iter().map(|r| r.as_str()).chain([OK]) {
                drop(self.requests.get_or_create(&Ending { side, rank, reason }));
            }
            for transport in table::all().map(Kind::as_str) {
                let on_wire = OnWire {
                    side,
                    rank,
                    transport,
                };
                drop(self.bytes.get_or_create(&on_wire));
                drop(self.chunks.get_or_create(&on_wire));
            }
        }
        for side in [RankRole::Sender, RankRole::Receiver].map(RankRole::as_str) {
            for reason in [Reason::BadRequest, Reason::LayoutMismatch].map(Reason::as_str) {
                drop(
                    self.engines_refused
                        .get_or_create(&RefusedEngine { side, reason }),
                );
            }
        }
        for port in PORTS {
            drop(self.malformed.get_or_create(&AtPort { port }));
        }
    }

    /// Counts a request that has ended.
    pub(crate) fn record(&self, side: RankRole, rank: u32, record: &Record) {
        let name = side.as_str();
        let of_rank = OfRank { side: name, rank };
        let reason = record.reason.map_or(OK, Reason::as_str);
        let ending = Ending {
            side: name,
            rank,
            reason,
        };
        self.requests.get_or_create(&ending).inc();
        self.tokens
            .get_or_create(&of_rank)
            .inc_by(record.tokens.into());
        self.tokens_held
            .get_or_create(&of_rank)
            .inc_by(record.have_tokens.into());
        self.windowed
            .get_or_create(&of_rank)
            .inc_by(record.windowed.into());
        // A request that moved no chunk may have no wire.
        if record.chunks > 0 {
            let on_wire = OnWire {
                side: name,
                rank,
                transport: wire(&record.transport),
            };
            self.bytes.get_or_create(&on_wire).inc_by(record.bytes);
            self.chunks
                .get_or_create(&on_wire)
                .inc_by(record.chunks.into());
        }
        // Each role measures only its own phases.
        let phases: &[(&'static str, u64)] = match side {
            RankRole::Sender => &[
                ("alloc", record.alloc_us),
                ("gather", record.gather_us),
                ("push", record.push_us),
            ],
            RankRole::Receiver => &[("ready", record.ready_us), ("scatter", record.scatter_us)],
        };
        for &(phase, us) in phases {
            // A phase that the request did not reach has no time. Its 0 would lower every quantile.
            if us > 0 {
                let labels = InPhase {
                    side: name,
                    rank,
                    phase,
                };
                self.phases.get_or_create(&labels).observe(seconds(us));
            }
        }
    }

    /// Counts a frame that was not a message.
    pub(crate) fn malformed(&self, port: &'static str) {
        self.malformed.get_or_create(&AtPort { port }).inc();
    }

    /// Counts an engine that was refused.
    pub(crate) fn engine_refused(&self, side: RankRole, reason: Reason) {
        let labels = RefusedEngine {
            side: side.as_str(),
            reason: reason.as_str(),
        };
        self.engines_refused.get_or_create(&labels).inc();
    }

    /// Counts a message to the proxy.
    pub(crate) fn told_proxy(&self, kind: &'static str, result: DeliveryResult) {
        let result = match result {
            DeliveryResult::Sent => "sent",
            DeliveryResult::Dropped => "dropped",
        };
        self.proxy_messages
            .get_or_create(&ToProxy { kind, fate: result })
            .inc();
    }

    /// Counts a call-back of the proxy.
    pub(crate) fn acknowledged(&self) {
        self.proxy_acknowledgements.inc();
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

fn wire(name: &str) -> &'static str {
    let mut names = table::all().map(Kind::as_str);
    names.find(|w| *w == name).unwrap_or("other")
}

#[expect(clippy::cast_precision_loss, reason = "a time for people")]
fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

/// The `reason` of a request that ended well.
const OK: &str = "ok";
const PORTS: [&str; 5] = ["init", "alloc", "query", "local", "admin"];

#[cfg(test)]
mod tests;
