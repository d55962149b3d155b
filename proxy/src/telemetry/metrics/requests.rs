//! Metrics of requests and their legs.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::{Counters, Metrics, touch};
use crate::openai::endpoint::Endpoint;
use crate::openai::error::Code;
use crate::openai::fallback::Fallback;
use crate::telemetry::labels::{Labels, Leg};
use crate::telemetry::outcome::Outcome;

/// Metrics of requests and their legs.
pub(super) struct Requests {
    ended: Counters<2>,
    rejected: Counters<1>,
    transfers: Counter,
    fallbacks: Counters<1>,
    leg_errors: Counters<2>,
    prefill_retries: Counter,
    decode_retries: Counter,
    in_flight: Gauge,
    begun: Histogram,
    prefill: Histogram,
    first_byte: Histogram,
    total: Histogram,
}

impl Requests {
    /// Registers the metrics, at zero.
    pub(super) fn register(r: &mut Registry) -> Self {
        let all = Self {
            ended: Counters::default(),
            rejected: Counters::default(),
            transfers: Counter::default(),
            fallbacks: Counters::default(),
            leg_errors: Counters::default(),
            prefill_retries: Counter::default(),
            decode_retries: Counter::default(),
            in_flight: Gauge::default(),
            begun: histogram(),
            prefill: histogram(),
            first_byte: histogram(),
            total: histogram(),
        };
        r.register("requests", "Requests that have ended", all.ended.clone());
        r.register(
            "rejected",
            "Requests that got an error before any leg was sent",
            all.rejected.clone(),
        );
        r.register(
            "transfers",
            "Decode legs sent with transfer parameters",
            all.transfers.clone(),
        );
        r.register(
            "alone",
            "Decode legs sent without transfer parameters, by reason",
            all.fallbacks.clone(),
        );
        r.register("leg_errors", "Legs that failed", all.leg_errors.clone());
        r.register(
            "prefill_retries",
            "Prefill legs sent again to another instance",
            all.prefill_retries.clone(),
        );
        r.register(
            "decode_retries",
            "Decode legs sent again to another instance",
            all.decode_retries.clone(),
        );
        r.register(
            "in_flight_requests",
            "Requests under way",
            all.in_flight.clone(),
        );
        let begun = "Arrival to the prefill engine's begin";
        let prefill = "Arrival to the prefill leg's answer";
        let first_byte = "Arrival to the first byte of the answer";
        for (name, help, metric) in [
            ("begun", begun, &all.begun),
            ("prefill", prefill, &all.prefill),
            ("first_byte", first_byte, &all.first_byte),
            ("request", "Arrival to the end", &all.total),
        ] {
            r.register_with_unit(name, help, Unit::Seconds, metric.clone());
        }
        all.touch();
        all
    }

    fn touch(&self) {
        for endpoint in Endpoint::names() {
            for outcome in Outcome::ALL {
                touch(&self.ended, request_labels(endpoint, outcome));
            }
        }
        for fallback in Fallback::ALL {
            touch(&self.fallbacks, Labels([("reason", fallback.as_str())]));
        }
        for &code in Code::ALL {
            touch(&self.rejected, Labels([("code", code.as_str())]));
        }
        for leg in Leg::ALL {
            touch(&self.leg_errors, leg_labels(leg));
        }
    }
}

impl Metrics {
    /// Counts a request that has arrived.
    pub fn arrived(&self) {
        self.requests.in_flight.inc();
    }

    /// Counts a request that has ended.
    pub fn ended(&self, endpoint: Endpoint, outcome: Outcome, total: Duration) {
        let requests = &self.requests;
        requests.in_flight.dec();
        let labels = request_labels(endpoint.as_str(), outcome);
        requests.ended.get_or_create(&labels).inc();
        // A probe takes a millisecond. It would hide the times of the requests that generate text.
        if endpoint.generates() {
            requests.total.observe(total.as_secs_f64());
        }
    }

    /// Counts a request that got an error before any leg was sent.
    pub fn rejected(&self, code: Code) {
        let labels = Labels([("code", code.as_str())]);
        self.requests.rejected.get_or_create(&labels).inc();
    }

    /// Counts a decode leg that is sent, with or without a transfer.
    pub fn decode_sent(&self, transfer: Result<(), Fallback>) {
        let Err(fallback) = transfer else {
            self.requests.transfers.inc();
            return;
        };
        if fallback == Fallback::DecodeRetry {
            self.requests.decode_retries.inc();
        }
        let labels = Labels([("reason", fallback.as_str())]);
        self.requests.fallbacks.get_or_create(&labels).inc();
    }

    /// Counts a prefill leg that is sent again to another instance.
    pub fn prefill_retried(&self) {
        self.requests.prefill_retries.inc();
    }

    /// Counts a leg that failed.
    pub fn leg_failed(&self, leg: Leg) {
        let errors = &self.requests.leg_errors;
        errors.get_or_create(&leg_labels(leg)).inc();
    }

    /// Notes the time from a request's arrival until its prefill engine begins.
    pub fn begun_after(&self, time: Duration) {
        self.requests.begun.observe(time.as_secs_f64());
    }

    /// Notes the time from a request's arrival to the end of its prefill leg.
    pub fn prefill_after(&self, time: Duration) {
        self.requests.prefill.observe(time.as_secs_f64());
    }

    /// Notes the time from a request's arrival to the first byte of its answer.
    pub fn first_byte_after(&self, time: Duration) {
        self.requests.first_byte.observe(time.as_secs_f64());
    }
}

fn leg_labels(leg: Leg) -> Labels<2> {
    let (leg, kind) = leg.names();
    Labels([("leg", leg), ("kind", kind)])
}

fn request_labels(endpoint: &'static str, outcome: Outcome) -> Labels<2> {
    Labels([("endpoint", endpoint), ("outcome", outcome.as_str())])
}

/// Returns a histogram of times from 1 ms (a scripted engine's answer) to 2 min (a long generation).
fn histogram() -> Histogram {
    Histogram::new([
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
        120.0,
    ])
}
