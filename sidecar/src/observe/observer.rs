//! Passes each change of a rank's state to everything that shows it: the status and the proxy.

use std::sync::Arc;

use common::zmq::Traffic;
use protocol::record::Record;
use protocol::registration::ToProxy;

use crate::observe::registration::ProxyVoice;
use crate::observe::status::Status;
use crate::rank::context::{Gauges, KeptStatus, LinkStatus, Observer, RankRole};
use crate::transport::set::Wires;

/// Passes each change to the status and the proxy.
#[derive(Clone, Debug)]
pub(crate) struct Fanout {
    /// State for the admin server and the registrations.
    pub(crate) status: Arc<Status>,
    /// Queue of messages to the proxy; absent without a proxy.
    pub(crate) proxy: Option<ProxyVoice>,
}

impl Observer for Fanout {
    fn record(&self, role: RankRole, rank: u32, record: &Record) {
        self.status.record(role, rank, record);
    }

    fn gauges(&self, role: RankRole, rank: u32, gauges: Gauges<'_>) {
        self.status.gauges(role, rank, &gauges);
    }

    fn wires(&self, role: RankRole, rank: u32, wires: Wires) {
        self.status.wires(role, rank, wires);
    }

    fn port(&self, rank: u32, port: &'static str, traffic: Traffic) {
        self.status.port(rank, port, traffic);
    }

    fn kept(&self, rank: u32, requests: &mut dyn Iterator<Item = KeptStatus>) {
        self.status.kept(rank, requests);
    }

    fn links(&self, rank: u32, links: &mut dyn Iterator<Item = &LinkStatus>) {
        self.status.links(rank, links);
    }

    fn tell_proxy(&self, message: &ToProxy) {
        if let Some(proxy) = &self.proxy {
            proxy.tell(message.clone());
        }
    }
}
