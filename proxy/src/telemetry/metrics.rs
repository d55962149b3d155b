//! The metrics, as docs/proxy/metrics.md lists them. Each file of the folder `metrics` registers the metrics
//! of one part of the proxy, and has the methods that change these metrics.

use std::fmt;
use std::sync::Arc;

use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::fleet::instance::Instance;
use crate::routing::models::ModelState;
use crate::telemetry::labels::Labels;

pub(crate) mod clients;
mod instances;
mod kv;
mod models;
mod registration;
mod requests;
mod spans;

/// A family of counters.
type Counters<const N: usize> = Family<Labels<N>, Counter>;

/// All metrics of one proxy, except the metrics of single instances.
pub struct Metrics {
    registry: Registry,
    clients: clients::Clients,
    registration: registration::Registration,
    requests: requests::Requests,
    spans: spans::Spans,
    kv: kv::Kv,
}

impl Metrics {
    /// Returns all metrics at zero, with every label value that is known in advance.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("pd_proxy");
        let r = &mut registry;
        r.register(
            "build",
            "Version of the proxy",
            Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]),
        );
        // docs/proxy/metrics.md has a row for each name; a test compares the two.
        Self {
            requests: requests::Requests::register(r),
            registration: registration::Registration::register(r),
            spans: spans::Spans::register(r),
            kv: kv::Kv::register(r),
            clients: clients::Clients::register(r),
            registry,
        }
    }

    /// Returns all metrics in the text format of OpenMetrics, including the metrics of these instances and
    /// models.
    pub fn text(&self, instances: &[Arc<Instance>], models: &[Arc<ModelState>]) -> String {
        let mut text = String::new();
        // Writing into a string does not fail.
        encode_registry(&mut text, &self.registry).expect("a string takes everything");
        instances::write(&mut text, instances).expect("a string takes everything");
        models::write(&mut text, models).expect("a string takes everything");
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

/// Creates one label value with the count zero, so that a query of the rate does not miss the first event of
/// a rare label value.
fn touch<const N: usize>(family: &Counters<N>, labels: Labels<N>) {
    drop(family.get_or_create(&labels));
}
