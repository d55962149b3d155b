//! Metrics of registered instances, and of the messages from their sidecars.

use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use protocol::Reason;
use protocol::registration::NotifX;

use super::{Counters, Metrics, touch};
use crate::fleet::registry::Answer;
use crate::telemetry::labels::{InstanceCounts, Labels, Message};

/// Metrics of registered instances, and of the messages from their sidecars.
pub(super) struct Registration {
    messages: Counters<1>,
    call_backs: Counters<1>,
    instances: Family<Labels<2>, Gauge>,
    shared: Counters<1>,
    notices: Counters<1>,
    moved_bytes: Counter<u64, AtomicU64>,
}

impl Registration {
    /// Registers the metrics, at zero.
    pub(super) fn register(r: &mut Registry) -> Self {
        let all = Self {
            messages: Counters::default(),
            call_backs: Counters::default(),
            instances: Family::default(),
            shared: Counters::default(),
            notices: Counters::default(),
            moved_bytes: Counter::default(),
        };
        r.register(
            "registration_messages",
            "Messages on the registration port",
            all.messages.clone(),
        );
        r.register(
            "call_backs",
            "Call-backs to registered sidecars",
            all.call_backs.clone(),
        );
        r.register("instances", "Registered instances", all.instances.clone());
        r.register(
            "shared_registry",
            "Exchanges with the shared registry",
            all.shared.clone(),
        );
        r.register(
            "notices",
            "Senders' notices on a request's KV",
            all.notices.clone(),
        );
        r.register_with_unit(
            "moved",
            "KV that senders report as written",
            Unit::Bytes,
            all.moved_bytes.clone(),
        );
        all.touch();
        all
    }

    fn touch(&self) {
        for message in Message::ALL {
            touch(&self.messages, Labels([("kind", message.as_str())]));
        }
        for result in Answer::NAMES {
            touch(&self.call_backs, Labels([("result", result)]));
        }
        for reason in std::iter::once(None).chain(Reason::ALL.iter().copied().map(Some)) {
            touch(&self.notices, notice_labels(reason));
        }
        self.show(&InstanceCounts::default());
    }

    fn show(&self, counts: &InstanceCounts) {
        for (role, row) in ["prefill", "decode", "both"].into_iter().zip(counts.0) {
            for (state, count) in ["unverified", "ready", "not_ready"].into_iter().zip(row) {
                let labels = Labels([("role", role), ("state", state)]);
                self.instances.get_or_create(&labels).set(count);
            }
        }
    }
}

impl Metrics {
    /// Counts a message at the registration port.
    pub fn message(&self, message: Message) {
        let labels = Labels([("kind", message.as_str())]);
        self.registration.messages.get_or_create(&labels).inc();
    }

    /// Counts a call-back that has ended.
    pub fn called_back(&self, answer: &Answer) {
        let labels = Labels([("result", answer.as_str())]);
        self.registration.call_backs.get_or_create(&labels).inc();
    }

    /// Counts an exchange with the shared registry.
    pub fn shared(&self, is_ok: bool) {
        let result = if is_ok { "ok" } else { "failed" };
        let labels = Labels([("result", result)]);
        self.registration.shared.get_or_create(&labels).inc();
    }

    /// Counts a sender's notice about a request's KV. `details` is `None` if LMCache sent the notice.
    pub fn notice(&self, details: Option<&NotifX>) {
        let labels = notice_labels(details.and_then(|x| x.reason));
        self.registration.notices.get_or_create(&labels).inc();
        let bytes = details.map_or(0, |x| x.bytes);
        self.registration.moved_bytes.inc_by(bytes);
    }

    /// Sets the numbers of registered instances.
    pub fn show_instances(&self, counts: &InstanceCounts) {
        self.registration.show(counts);
    }
}

fn notice_labels(reason: Option<Reason>) -> Labels<1> {
    Labels([("result", reason.map_or("done", Reason::as_str))])
}
