//! The metrics, as docs/proxy.md lists them.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use protocol::Reason;
use protocol::registration::NotifX;

use crate::body::Endpoint;
use crate::error::Code;
use crate::instance::Instance;
use crate::labels::{InstanceCounts, Labels, Leg, Message};
use crate::life::Outcome;
use crate::registry::Answer;
use crate::route::Alone;

/// A family of counters.
type Counters<const N: usize> = Family<Labels<N>, Counter>;

/// Everything that is counted.
pub struct Metrics {
    registry: Registry,
    requests: Counters<2>,
    rejected: Counters<1>,
    transfers: Counter,
    alone: Counters<1>,
    leg_errors: Counters<2>,
    prefill_retries: Counter,
    decode_retries: Counter,
    in_flight: Gauge,
    begun: Histogram,
    prefill: Histogram,
    first_byte: Histogram,
    total: Histogram,
    messages: Counters<1>,
    call_backs: Counters<1>,
    instances: Family<Labels<2>, Gauge>,
    shared: Counters<1>,
    spans: Counters<1>,
    notices: Counters<1>,
    moved_bytes: Counter<u64, AtomicU64>,
}

impl Metrics {
    /// All metrics at zero, with every label value that is known in advance.
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
        };
        metrics.register();
        metrics.touch();
        metrics
    }

    fn register(&mut self) {
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

    /// Creates the label values, so that a rate over a rare one does not begin with a gap.
    fn touch(&self) {
        for endpoint in [Endpoint::Completions, Endpoint::Chat] {
            for outcome in Outcome::ALL {
                touch(&self.requests, request_labels(endpoint, outcome));
            }
        }
        for alone in Alone::ALL {
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

    /// A request has arrived.
    pub fn arrived(&self) {
        self.in_flight.inc();
    }

    /// A request has ended.
    pub fn ended(&self, endpoint: Endpoint, outcome: Outcome, total: Duration) {
        self.in_flight.dec();
        self.requests
            .get_or_create(&request_labels(endpoint, outcome))
            .inc();
        self.total.observe(total.as_secs_f64());
    }

    /// A request got an error before any leg was sent.
    pub fn rejected(&self, code: Code) {
        self.rejected
            .get_or_create(&Labels([("code", code.as_str())]))
            .inc();
    }

    /// A decode leg is sent.
    pub fn decode_sent(&self, transfer: Result<(), Alone>) {
        match transfer {
            Ok(()) => drop(self.transfers.inc()),
            Err(alone) => {
                if alone == Alone::DecodeRetry {
                    self.decode_retries.inc();
                }
                self.alone
                    .get_or_create(&Labels([("reason", alone.as_str())]))
                    .inc();
            }
        }
    }

    /// A prefill leg is sent again to another instance.
    pub fn prefill_retried(&self) {
        self.prefill_retries.inc();
    }

    /// A leg failed.
    pub fn leg_failed(&self, leg: Leg) {
        self.leg_errors.get_or_create(&leg_labels(leg)).inc();
    }

    /// The prefill engine began.
    pub fn begun_after(&self, time: Duration) {
        self.begun.observe(time.as_secs_f64());
    }

    /// The prefill leg was answered.
    pub fn prefill_after(&self, time: Duration) {
        self.prefill.observe(time.as_secs_f64());
    }

    /// The first byte came.
    pub fn first_byte_after(&self, time: Duration) {
        self.first_byte.observe(time.as_secs_f64());
    }

    /// A message came to the registration port.
    pub fn message(&self, message: Message) {
        self.messages
            .get_or_create(&Labels([("kind", message.as_str())]))
            .inc();
    }

    /// A call-back ended.
    pub fn called_back(&self, answer: &Answer) {
        let labels = Labels([("result", answer.as_str())]);
        self.call_backs.get_or_create(&labels).inc();
    }

    /// An exchange with the shared registry has ended.
    pub fn shared(&self, is_ok: bool) {
        let result = if is_ok { "ok" } else { "failed" };
        let labels = Labels([("result", result)]);
        self.shared.get_or_create(&labels).inc();
    }

    /// Spans were sent, failed or dropped.
    pub fn spans(&self, result: &'static str, count: usize) {
        let labels = Labels([("result", result)]);
        self.spans.get_or_create(&labels).inc_by(count as u64);
    }

    /// A sender's notice on a request's KV; LMCache's has no details.
    pub fn notice(&self, details: Option<&NotifX>) {
        let reason = details.and_then(|x| x.reason);
        self.notices.get_or_create(&notice_labels(reason)).inc();
        self.moved_bytes.inc_by(details.map_or(0, |x| x.bytes));
    }

    /// Who is there.
    pub fn show_instances(&self, counts: &InstanceCounts) {
        for (role, row) in ["prefill", "decode", "both"].into_iter().zip(counts.0) {
            for (state, count) in ["unverified", "ready", "not_ready"].into_iter().zip(row) {
                self.instances
                    .get_or_create(&Labels([("role", role), ("state", state)]))
                    .set(count);
            }
        }
    }

    /// The text that Prometheus reads.
    pub fn text(&self, instances: &[Arc<Instance>]) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        encode_registry(&mut text, &self.registry).expect("a string takes everything");
        each_instance(&mut text, instances).expect("a string takes everything");
        encode_eof(&mut text).expect("a string takes everything");
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Metrics of each instance: not families, because instances come and go, and their names are their
/// own, which prometheus-client 0.23 would write as they are.
fn each_instance(out: &mut String, instances: &[Arc<Instance>]) -> fmt::Result {
    type Read = fn(&Instance) -> f64;
    let all: [(&str, &str, &str, Read); 6] = [
        ("legs", "gauge", "Legs under way", |i| {
            f64::from(facts(i).legs)
        }),
        (
            "tokens",
            "gauge",
            "Tokens of legs under way, estimated",
            |i| facts(i).tokens as f64,
        ),
        (
            "paused",
            "gauge",
            "1 while it keeps failing and is left alone",
            |i| f64::from(u8::from(facts(i).is_open)),
        ),
        ("answered", "counter", "Legs that were answered", |i| {
            i.load.done().answered as f64
        }),
        (
            "answer_seconds",
            "counter",
            "Sum of the times to these answers",
            |i| i.load.done().seconds,
        ),
        ("failed", "counter", "Legs that failed by its fault", |i| {
            i.load.done().failed as f64
        }),
    ];
    for (name, kind, help, read) in all {
        writeln!(out, "# HELP pd_proxy_instance_{name} {help}.")?;
        writeln!(out, "# TYPE pd_proxy_instance_{name} {kind}")?;
        let total = if kind == "counter" { "_total" } else { "" };
        for instance in instances {
            let id = escaped(&instance.id);
            let value = read(instance);
            writeln!(
                out,
                "pd_proxy_instance_{name}{total}{{instance=\"{id}\"}} {value}"
            )?;
        }
    }
    Ok(())
}

fn facts(instance: &Instance) -> crate::route::Facts {
    instance.load.facts(Instant::now())
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

fn touch<const N: usize>(family: &Counters<N>, labels: Labels<N>) {
    drop(family.get_or_create(&labels));
}

fn leg_labels(leg: Leg) -> Labels<2> {
    let (leg, kind) = leg.names();
    Labels([("leg", leg), ("kind", kind)])
}

fn notice_labels(reason: Option<Reason>) -> Labels<1> {
    Labels([("result", reason.map_or("done", Reason::as_str))])
}

fn request_labels(endpoint: Endpoint, outcome: Outcome) -> Labels<2> {
    Labels([
        ("endpoint", endpoint.as_str()),
        ("outcome", outcome.as_str()),
    ])
}

/// From a scripted engine's answer within a millisecond to a long generation: 1 ms to 2 min.
fn histogram() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
        120.0,
    ])
}

#[cfg(test)]
mod tests {
    use protocol::registration::InstanceRole;

    use super::*;
    use crate::instance::{Connector, Named, Source};

    #[test]
    fn names_of_instances_cannot_end_their_label() {
        let named = Named {
            role: InstanceRole::Decode,
            url: "http://d:1".into(),
            id: Some("a\"}b\\".into()),
            connector: Connector::Nixl,
            host: None,
            init_ports: Vec::new(),
            alloc_ports: Vec::new(),
            zmq: None,
        };
        let instance = Arc::new(Instance::named(&named, Source::Added).unwrap());
        drop(instance.load.charge(5));
        let _running = instance.load.charge(7);
        let text = Metrics::new().text(&[instance]);
        let line = "pd_proxy_instance_tokens{instance=\"a\\\"}b\\\\\"} 7\n";
        assert!(text.contains(line), "{text}");
        assert!(text.ends_with("# EOF\n"));
        assert_eq!(text.matches("# EOF").count(), 1);
    }
}
