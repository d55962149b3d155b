//! Counts the frames that are not valid messages, by port.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// The counter of frames that are not valid messages. All clones share the same numbers.
#[derive(Clone, Debug)]
pub(crate) struct MalformedFrames(Family<AtPort, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AtPort {
    port: &'static str,
}

impl Default for MalformedFrames {
    /// Makes the counter with one series per port, so that the rate of a series is 0 and not absent before
    /// the first frame is counted.
    fn default() -> Self {
        let counter = Self(Family::default());
        for port in PORTS {
            drop(counter.0.get_or_create(&AtPort { port }));
        }
        counter
    }
}

impl MalformedFrames {
    /// Registers the counter.
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "malformed_frames",
            "Frames that were no message, by port",
            self.0.clone(),
        );
    }

    /// Counts a frame that was not a message.
    pub(crate) fn count(&self, port: &'static str) {
        self.0.get_or_create(&AtPort { port }).inc();
    }
}

const PORTS: [&str; 6] = ["init", "alloc", "query", "fetch", "local", "admin"];
