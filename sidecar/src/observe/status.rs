//! What this sidecar shows of itself: the one place that `/ready`, `/status`, `/requests`, the gauges
//! of `/metrics` and the registrations are read from.
//!
//! The sides write into it after each event, so writing is cheap: a short lock, and nothing is
//! allocated while nothing but numbers changes. The lock is never held across an await.

mod shape;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::record::Record;
use protocol::registration::{Leave, Register};
use protocol::{Epoch, VERSION};
use tokio::sync::Notify;

pub(crate) use self::shape::{
    ACKNOWLEDGED_FOR, LinkRow, NotReady, ProxyStatus, RankStatus, RecordRow, Snapshot,
};

use crate::config::Config;
use crate::net::zmq::{Listener, Traffic};
use crate::observe::listening::Listens;
use crate::rank::context::{Gauges, LinkStatus, RankRole};
use crate::transport::set::Wires;

/// See the module.
#[derive(Debug)]
pub(crate) struct Status {
    about: About,
    inner: Mutex<Inner>,
    changed: Notify,
}

/// What does not change while the process lives.
#[derive(Clone, Debug)]
pub(crate) struct About {
    /// The sidecar's name.
    pub(crate) id: String,
    /// This start.
    pub(crate) epoch: Epoch,
    /// `sender`, `receiver` or `both`.
    pub(crate) role: &'static str,
    /// Every side of every rank.
    pub(crate) sides: Vec<(RankRole, u32)>,
    /// The proxy's registration port, if there is a proxy.
    pub(crate) proxy: Option<String>,
}

/// Something that happens on a wire, and how often it has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WireEvent {
    /// Which side of it.
    pub(crate) side: RankRole,
    /// The rank.
    pub(crate) rank: u32,
    /// The wire's name.
    pub(crate) transport: &'static str,
    /// The event's name.
    pub(crate) event: &'static str,
    /// How often, or how many now.
    pub(crate) count: u64,
}

#[derive(Debug, Default)]
struct Inner {
    bound: bool,
    draining: bool,
    ranks: BTreeMap<(RankRole, u32), RankStatus>,
    wires: BTreeMap<(RankRole, u32), Wires>,
    ports: BTreeMap<(u32, &'static str), Traffic>,
    links: BTreeMap<u32, Vec<LinkRow>>,
    records: VecDeque<RecordRow>,
    acknowledged: Option<(Instant, String)>,
    /// The kind of proxy that was connected last.
    listener: Option<Listener>,
    listens: Vec<Listens>,
}

impl Status {
    /// Of a process that has not bound its ports yet.
    pub(crate) fn new(config: &Config) -> Self {
        let mut sides = Vec::new();
        for rank in 0..config.ranks {
            if config.sends() {
                sides.push((RankRole::Sender, rank));
            }
            if config.receives() {
                sides.push((RankRole::Receiver, rank));
            }
        }
        let ranks = sides
            .iter()
            .map(|&(side, rank)| ((side, rank), RankStatus::new(side, rank)))
            .collect();
        Self {
            about: About {
                id: config.id.clone(),
                epoch: Epoch(rand::random_range(1..=u64::MAX)),
                role: config.role.as_str(),
                sides,
                proxy: config.proxy.as_ref().map(|p| p.address.to_string()),
            },
            inner: Mutex::new(Inner {
                ranks,
                ..Inner::default()
            }),
            changed: Notify::new(),
        }
    }

    /// What does not change.
    pub(crate) fn about(&self) -> &About {
        &self.about
    }

    /// Every port is bound.
    pub(crate) fn bound(&self) {
        self.inner().bound = true;
        self.changed.notify_one();
    }

    /// Nothing new is taken any more.
    pub(crate) fn draining(&self) {
        self.inner().draining = true;
        self.changed.notify_one();
    }

    /// The proxy has called back.
    pub(crate) fn acknowledged(&self, proxy: &str, now: Instant) {
        self.inner().acknowledged = Some((now, proxy.to_owned()));
    }

    /// Notes the kind of proxy that is connected; one that is away may come back. Returns true if it is
    /// another than before.
    pub(crate) fn listens_to_us(&self, listener: Listener) -> bool {
        let mut inner = self.inner();
        if listener == Listener::Nobody || inner.listener == Some(listener) {
            return false;
        }
        inner.listener = Some(listener);
        true
    }

    /// Every socket on which this process listens.
    pub(crate) fn listens(&self, sockets: Vec<Listens>) {
        self.inner().listens = sockets;
    }

    /// The state of a side after an event.
    pub(crate) fn gauges(&self, side: RankRole, rank: u32, gauges: &Gauges<'_>) {
        let mut inner = self.inner();
        let status = inner
            .ranks
            .entry((side, rank))
            .or_insert_with(|| RankStatus::new(side, rank));
        let said =
            |status: &RankStatus| (status.engines > 0, status.epoch, status.unmoved.is_some());
        let before = said(status);
        status.update(gauges);
        let after = said(status);
        drop(inner);
        // The proxy pairs instances by what they say here.
        if before != after {
            self.changed.notify_one();
        }
    }

    /// The wires of a side.
    pub(crate) fn wires(&self, side: RankRole, rank: u32, wires: Wires) {
        self.inner().wires.insert((side, rank), wires);
    }

    /// What has happened on every wire.
    pub(crate) fn wire_events(&self) -> Vec<WireEvent> {
        let wires = self.inner().wires.clone();
        let mut all = Vec::new();
        for ((side, rank), wires) in wires {
            all.extend(
                wires
                    .events()
                    .into_iter()
                    .map(|(transport, event, count)| WireEvent {
                        side,
                        rank,
                        transport,
                        event,
                        count,
                    }),
            );
        }
        all
    }

    /// A bound port.
    pub(crate) fn port(&self, rank: u32, port: &'static str, traffic: Traffic) {
        self.inner().ports.insert((rank, port), traffic);
    }

    /// The bound ports by rank and name.
    pub(crate) fn ports(&self) -> BTreeMap<(u32, &'static str), Traffic> {
        self.inner().ports.clone()
    }

    /// The links of a sender's rank after an event.
    pub(crate) fn links(&self, rank: u32, links: &mut dyn Iterator<Item = &LinkStatus>) {
        let mut inner = self.inner();
        let rows = inner.links.entry(rank).or_default();
        let mut len = 0;
        for link in links {
            match rows.get_mut(len) {
                Some(row) if row.is_of(link) => row.measured_gb_per_s = link.rate(),
                Some(row) => *row = LinkRow::new(rank, link),
                None => rows.push(LinkRow::new(rank, link)),
            }
            len += 1;
        }
        rows.truncate(len);
    }

    /// A request has ended.
    pub(crate) fn record(&self, side: RankRole, rank: u32, record: &Record) {
        let row = RecordRow {
            side: side.as_str(),
            rank,
            record: record.clone(),
        };
        let records = &mut self.inner().records;
        if records.len() == MAX_RECORDS {
            records.pop_front();
        }
        records.push_back(row);
    }

    /// The last [`MAX_RECORDS`] requests that have ended, oldest first.
    pub(crate) fn records(&self) -> Vec<RecordRow> {
        self.inner().records.iter().cloned().collect()
    }

    /// Why a push would not work now; empty if it would.
    pub(crate) fn obstacles(&self, now: Instant) -> Vec<NotReady> {
        self.inner().obstacles(&self.about, now)
    }

    /// Everything at this moment.
    pub(crate) fn snapshot(&self, now: Instant) -> Snapshot {
        let inner = self.inner();
        let obstacles = inner.obstacles(&self.about, now);
        Snapshot {
            id: self.about.id.clone(),
            epoch: self.about.epoch,
            role: self.about.role,
            version: env!("CARGO_PKG_VERSION"),
            ready: obstacles.is_empty(),
            reasons: obstacles.iter().map(ToString::to_string).collect(),
            unmoved: inner.unmoved().map(str::to_owned),
            ranks: inner.ranks.values().cloned().collect(),
            links: inner.links.values().flatten().cloned().collect(),
            listens: inner.listens.clone(),
            proxy: self.about.proxy.clone().map(|address| ProxyStatus {
                address,
                calls_back: inner.listener != Some(Listener::Lmcache),
                name: inner
                    .acknowledged
                    .as_ref()
                    .map_or(String::new(), |(_, name)| name.clone()),
                acknowledged_ms_ago: inner.acknowledged.as_ref().map(|(at, _)| {
                    u64::try_from(now.saturating_duration_since(*at).as_millis())
                        .unwrap_or(u64::MAX)
                }),
            }),
        }
    }

    /// The registration at this moment, of a sidecar whose admin server is bound to `admin_port`.
    pub(crate) fn registration(&self, config: &Config, admin_port: u16, now: Instant) -> Register {
        let inner = self.inner();
        // The proxy has not acknowledged what it has not heard of: that is no reason not to be ready.
        let ready = inner
            .obstacles(&self.about, now)
            .iter()
            .all(|o| matches!(o, NotReady::NoProxy(_)));
        let listen = config.listen.as_ref();
        let ports = |of: fn(&crate::config::RankPorts) -> u16| {
            listen.map_or(Vec::new(), |l| l.ranks.iter().map(of).collect())
        };
        let sum = |of: fn(&RankStatus) -> u32| {
            let total: u64 = inner.ranks.values().map(|r| u64::from(of(r))).sum();
            u32::try_from(total).unwrap_or(u32::MAX)
        };
        let period = config.proxy.as_ref().map_or(Duration::ZERO, |p| p.period);
        Register {
            v: VERSION,
            id: self.about.id.clone(),
            epoch: self.about.epoch,
            role: config.instance_role(),
            http: config
                .proxy
                .as_ref()
                .map_or(String::new(), |p| p.engine_url.clone()),
            admin: config.admin_url(admin_port),
            host: listen.map_or(String::new(), |l| l.advertise.clone()),
            init_ports: ports(|r| r.init),
            alloc_ports: ports(|r| r.alloc),
            ready,
            slots: sum(|r| r.slots),
            free_slots: sum(|r| r.free),
            parked_tokens: inner.ranks.values().map(|r| r.parked_tokens).sum(),
            period_ms: u32::try_from(period.as_millis()).unwrap_or(u32::MAX),
            ranks: config.ranks,
            layout: inner.ranks.values().find_map(|r| r.layout.clone()),
            unmoved: inner.unmoved().unwrap_or_default().to_owned(),
        }
    }

    /// The word that this sidecar goes away on purpose.
    pub(crate) fn leave(&self) -> Leave {
        Leave {
            id: self.about.id.clone(),
            epoch: self.about.epoch,
        }
    }

    /// Completes when something that readiness depends on has changed since the last call.
    ///
    /// # Cancel safety
    /// A change is not lost when the future is dropped.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere leaves numbers that are at most one event old.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The reason for which an engine moves no KV.
    fn unmoved(&self) -> Option<&str> {
        self.ranks.values().find_map(|r| r.unmoved.as_deref())
    }

    fn obstacles(&self, about: &About, now: Instant) -> Vec<NotReady> {
        let mut obstacles = Vec::new();
        if self.draining {
            obstacles.push(NotReady::Draining);
        }
        if !self.bound {
            obstacles.push(NotReady::Starting);
        }
        for (&(side, rank), status) in &self.ranks {
            if status.engines == 0 {
                obstacles.push(NotReady::NoEngine(side, rank));
            }
        }
        for (&(side, rank), wires) in &self.wires {
            if let Some(wire) = wires.ended() {
                obstacles.push(NotReady::WireEnded(side, rank, wire));
            }
        }
        // LMCache's proxy cannot acknowledge anything.
        if let Some(proxy) = &about.proxy
            && self.listener != Some(Listener::Lmcache)
        {
            let lately = self
                .acknowledged
                .as_ref()
                .is_some_and(|(at, _)| now.saturating_duration_since(*at) <= ACKNOWLEDGED_FOR);
            if !lately {
                obstacles.push(NotReady::NoProxy(proxy.clone()));
            }
        }
        obstacles
    }
}

/// Requests that `/requests` shows: some minutes of a busy instance in about 64 KiB.
pub(crate) const MAX_RECORDS: usize = 256;

#[cfg(test)]
pub(crate) mod tests;
