//! Registers the metrics, and creates every label value that is known in advance.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use protocol::Reason;

use super::{Counters, Metrics, leg_labels, notice_labels, request_labels};
use crate::fleet::registry::Answer;
use crate::openai::endpoint::Endpoint;
use crate::openai::error::Code;
use crate::openai::fallback::Fallback;
use crate::telemetry::labels::{InstanceCounts, Labels, Leg, Message};
use crate::telemetry::outcome::Outcome;

impl Metrics {
    /// Returns all metrics at zero, with every label value that is known in advance.
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("pd_proxy"),
            requests: Family::default(),
            rejected: Family::default(),
            transfers: Counter::default(),
            alone: Family::default(),
            leg_errors: Family::default(),
            prefill_retries: Counter::default(),
            decode_retries: Counter::default(),
            in_flight: Gauge::default(),
            begun: histogram(),
            prefill: histogram(),
            first_byte: histogram(),
            total: histogram(),
            messages: Family::default(),
            call_backs: Family::default(),
            instances: Family::default(),
            shared: Family::default(),
            spans: Family::default(),
            notices: Family::default(),
            moved_bytes: Counter::default(),
            uploads: Gauge::default(),
            idle_closed: Counter::default(),
        };
        metrics.register();
        metrics.touch();
        metrics
    }

    fn register(&mut self) {
        // docs/proxy/metrics.md has a row for each name; a test compares the two.
        let r = &mut self.registry;
        r.register(
            "build",
            "Version of the proxy",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        r.register(
            "requests",
            "Requests that have ended",
            self.requests.clone(),
        );
        r.register(
            "rejected",
            "Requests that got an error before any leg was sent",
            self.rejected.clone(),
        );
        r.register(
            "transfers",
            "Decode legs sent with transfer parameters",
            self.transfers.clone(),
        );
        r.register(
            "alone",
            "Decode legs sent without transfer parameters, by reason",
            self.alone.clone(),
        );
        r.register("leg_errors", "Legs that failed", self.leg_errors.clone());
        r.register(
            "prefill_retries",
            "Prefill legs sent again to another instance",
            self.prefill_retries.clone(),
        );
        r.register(
            "decode_retries",
            "Decode legs sent again to another instance",
            self.decode_retries.clone(),
        );
        r.register(
            "in_flight_requests",
            "Requests under way",
            self.in_flight.clone(),
        );
        for (name, help, metric) in [
            (
                "begun",
                "Arrival to the prefill engine's begin",
                &self.begun,
            ),
            (
                "prefill",
                "Arrival to the prefill leg's answer",
                &self.prefill,
            ),
            (
                "first_byte",
                "Arrival to the first byte of the answer",
                &self.first_byte,
            ),
            ("request", "Arrival to the end", &self.total),
        ] {
            r.register_with_unit(name, help, Unit::Seconds, metric.clone());
        }
        r.register(
            "registration_messages",
            "Messages on the registration port",
            self.messages.clone(),
        );
        r.register(
            "call_backs",
            "Call-backs to registered sidecars",
            self.call_backs.clone(),
        );
        r.register("instances", "Registered instances", self.instances.clone());
        r.register(
            "shared_registry",
            "Exchanges with the shared registry",
            self.shared.clone(),
        );
        r.register("spans", "Spans for the collector", self.spans.clone());
        r.register(
            "uploads",
            "Request bodies on their way in",
            self.uploads.clone(),
        );
        r.register(
            "idle_connections_closed",
            "Idle client connections closed to make room for others",
            self.idle_closed.clone(),
        );
        r.register(
            "notices",
            "Senders' notices on a request's KV",
            self.notices.clone(),
        );
        r.register_with_unit(
            "moved",
            "KV that senders report as written",
            Unit::Bytes,
            self.moved_bytes.clone(),
        );
    }

    /// Creates every label value at zero. Otherwise the rate over a rare value would miss its first event.
    fn touch(&self) {
        for endpoint in [Endpoint::Completions, Endpoint::Chat] {
            for outcome in Outcome::ALL {
                touch(&self.requests, request_labels(endpoint, outcome));
            }
        }
        for alone in Fallback::ALL {
            touch(&self.alone, Labels([("reason", alone.as_str())]));
        }
        for &code in Code::ALL {
            touch(&self.rejected, Labels([("code", code.as_str())]));
        }
        for leg in Leg::ALL {
            touch(&self.leg_errors, leg_labels(leg));
        }
        for message in Message::ALL {
            touch(&self.messages, Labels([("kind", message.as_str())]));
        }
        for result in Answer::NAMES {
            touch(&self.call_backs, Labels([("result", result)]));
        }
        for reason in std::iter::once(None).chain(Reason::ALL.iter().copied().map(Some)) {
            touch(&self.notices, notice_labels(reason));
        }
        self.show_instances(&InstanceCounts::default());
    }
}

/// Creates one label value at zero.
fn touch<const N: usize>(family: &Counters<N>, labels: Labels<N>) {
    drop(family.get_or_create(&labels));
}

/// Returns a histogram of times from 1 ms (a scripted engine's answer) to 2 min (a long generation).
fn histogram() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
        120.0,
    ])
}
