//! What the sides do, brought to everyone who shows it: status, metrics, the proxy.

use std::sync::Arc;

use protocol::Reason;
use protocol::record::Record;
use protocol::registration::ToProxy;

use crate::net::zmq::Traffic;
use crate::observe::metrics::Metrics;
use crate::observe::registration::ProxyVoice;
use crate::observe::status::Status;
use crate::rank::context::{Gauges, LinkStatus, Shown, Side};
use crate::transport::set::Wires;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Showcase {
    /// For the admin server and registrations.
    pub(crate) status: Arc<Status>,
    /// For Prometheus.
    pub(crate) metrics: Arc<Metrics>,
    /// To the proxy, if there is one.
    pub(crate) proxy: Option<ProxyVoice>,
}

impl Shown for Showcase {
    fn record(&self, side: Side, rank: u32, record: &Record) {
        self.metrics.record(side, rank, record);
        self.status.record(side, rank, record);
    }

    fn gauges(&self, side: Side, rank: u32, gauges: Gauges<'_>) {
        self.status.gauges(side, rank, &gauges);
    }

    fn wires(&self, side: Side, rank: u32, wires: Wires) {
        self.status.wires(side, rank, wires);
    }

    fn port(&self, rank: u32, port: &'static str, traffic: Traffic) {
        self.status.port(rank, port, traffic);
    }

    fn links(&self, rank: u32, links: &mut dyn Iterator<Item = &LinkStatus>) {
        self.status.links(rank, links);
    }

    fn malformed(&self, port: &'static str) {
        self.metrics.malformed(port);
    }

    fn engine_refused(&self, side: Side, reason: Reason) {
        self.metrics.engine_refused(side, reason);
    }

    fn tell_proxy(&self, message: &ToProxy) {
        if let Some(proxy) = &self.proxy {
            proxy.tell(message.clone());
        }
    }
}
