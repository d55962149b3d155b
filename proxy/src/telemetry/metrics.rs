//! The metrics, as docs/proxy/metrics.md lists them.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use protocol::Reason;
use protocol::registration::NotifX;

use crate::fleet::instance::Instance;
use crate::fleet::registry::Answer;
use crate::openai::endpoint::Endpoint;
use crate::openai::error::Code;
use crate::openai::fallback::Fallback;
use crate::telemetry::labels::{InstanceCounts, Labels, Leg, Message};
use crate::telemetry::outcome::Outcome;

mod families;
mod instances;

/// A family of counters.
type Counters<const N: usize> = Family<Labels<N>, Counter>;

/// All metrics of one proxy, except those of single instances.
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
    uploads: Gauge,
    idle_closed: Counter,
}

impl Metrics {
    /// Counts a request that has arrived.
    pub fn arrived(&self) {
        self.in_flight.inc();
    }

    /// Counts a request that has ended.
    pub fn ended(&self, endpoint: Endpoint, outcome: Outcome, total: Duration) {
        self.in_flight.dec();
        self.requests
            .get_or_create(&request_labels(endpoint, outcome))
            .inc();
        self.total.observe(total.as_secs_f64());
    }

    /// Counts a request that got an error before any leg was sent.
    pub fn rejected(&self, code: Code) {
        self.rejected
            .get_or_create(&Labels([("code", code.as_str())]))
            .inc();
    }

    /// Counts a decode leg that is sent, with a transfer or without one.
    pub fn decode_sent(&self, transfer: Result<(), Fallback>) {
        match transfer {
            Ok(()) => drop(self.transfers.inc()),
            Err(alone) => {
                if alone == Fallback::DecodeRetry {
                    self.decode_retries.inc();
                }
                self.alone
                    .get_or_create(&Labels([("reason", alone.as_str())]))
                    .inc();
            }
        }
    }

    /// Counts a prefill leg that is sent again to another instance.
    pub fn prefill_retried(&self) {
        self.prefill_retries.inc();
    }

    /// Counts a leg that failed.
    pub fn leg_failed(&self, leg: Leg) {
        self.leg_errors.get_or_create(&leg_labels(leg)).inc();
    }

    /// Notes the time from a request's arrival to the prefill engine's begin.
    pub fn begun_after(&self, time: Duration) {
        self.begun.observe(time.as_secs_f64());
    }

    /// Notes the time from a request's arrival to the end of its prefill leg.
    pub fn prefill_after(&self, time: Duration) {
        self.prefill.observe(time.as_secs_f64());
    }

    /// Notes the time from a request's arrival to the first byte of its answer.
    pub fn first_byte_after(&self, time: Duration) {
        self.first_byte.observe(time.as_secs_f64());
    }

    /// Counts a message at the registration port.
    pub fn message(&self, message: Message) {
        self.messages
            .get_or_create(&Labels([("kind", message.as_str())]))
            .inc();
    }

    /// Counts a call-back that has ended.
    pub fn called_back(&self, answer: &Answer) {
        let labels = Labels([("result", answer.as_str())]);
        self.call_backs.get_or_create(&labels).inc();
    }

    /// Counts an exchange with the shared registry.
    pub fn shared(&self, is_ok: bool) {
        let result = if is_ok { "ok" } else { "failed" };
        let labels = Labels([("result", result)]);
        self.shared.get_or_create(&labels).inc();
    }

    /// Counts spans that were sent, failed or dropped.
    pub fn spans(&self, result: &'static str, count: usize) {
        let labels = Labels([("result", result)]);
        self.spans.get_or_create(&labels).inc_by(count as u64);
    }

    /// Counts a sender's notice about a request's KV. `details` is `None` if LMCache sent the notice.
    pub fn notice(&self, details: Option<&NotifX>) {
        let reason = details.and_then(|x| x.reason);
        self.notices.get_or_create(&notice_labels(reason)).inc();
        self.moved_bytes.inc_by(details.map_or(0, |x| x.bytes));
    }

    /// Sets the number of request bodies that are being received.
    pub fn show_uploads(&self, count: usize) {
        self.uploads.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts an idle client connection that was closed to make room.
    pub fn idle_closed(&self) {
        self.idle_closed.inc();
    }

    /// Sets the numbers of registered instances.
    pub fn show_instances(&self, counts: &InstanceCounts) {
        for (role, row) in ["prefill", "decode", "both"].into_iter().zip(counts.0) {
            for (state, count) in ["unverified", "ready", "not_ready"].into_iter().zip(row) {
                self.instances
                    .get_or_create(&Labels([("role", role), ("state", state)]))
                    .set(count);
            }
        }
    }

    /// Returns all metrics in the text format of OpenMetrics, with those of the instances in `all`.
    pub fn text(&self, all: &[Arc<Instance>]) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        encode_registry(&mut text, &self.registry).expect("a string takes everything");
        instances::write(&mut text, all).expect("a string takes everything");
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
