//! Counts the messages to the proxy and the proxy's call-backs.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// The counters of the exchange with the proxy. All clones share the same numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct ProxyMetrics {
    messages: Family<ToProxy, Counter>,
    acknowledgements: Counter,
}

/// The result of sending a message to the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DeliveryResult {
    /// The socket accepted the message.
    Sent,
    /// The message is lost: a queue was full, or no proxy that accepts the message was connected.
    Dropped,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ToProxy {
    kind: &'static str,
    fate: &'static str,
}

impl ProxyMetrics {
    /// Registers the counters.
    pub(crate) fn register(&self, registry: &mut Registry) {
        let proxy = registry.sub_registry_with_prefix("proxy");
        proxy.register(
            "messages",
            "Messages to the proxy, by kind and what became of them",
            self.messages.clone(),
        );
        proxy.register(
            "acknowledgements",
            "Call-backs of the proxy",
            self.acknowledgements.clone(),
        );
    }

    /// Counts a message to the proxy.
    pub(crate) fn told(&self, kind: &'static str, result: DeliveryResult) {
        let fate = match result {
            DeliveryResult::Sent => "sent",
            DeliveryResult::Dropped => "dropped",
        };
        self.messages.get_or_create(&ToProxy { kind, fate }).inc();
    }

    /// Counts a call-back of the proxy.
    pub(crate) fn acknowledged(&self) {
        self.acknowledgements.inc();
    }
}
