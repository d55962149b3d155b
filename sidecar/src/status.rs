//! What this sidecar shows of itself: the one place that `/ready`, `/status`, `/requests`, the gauges
//! of `/metrics` and the registrations are read from.
//!
//! The sides write into it after each event, so writing is cheap: a short lock, and nothing is
//! allocated while nothing but numbers changes. The lock is never held across an await.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use protocol::record::Record;
use protocol::registration::{Leave, Register};
use protocol::{Epoch, Layout, VERSION};
use serde::Serialize;
use tokio::sync::Notify;

use crate::config::Config;
use crate::side::{Gauges, LinkStatus, Side};

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
    pub(crate) sides: Vec<(Side, u32)>,
    /// The proxy's registration port, if there is a proxy.
    pub(crate) proxy: Option<String>,
}

/// Why a push would not work now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotReady {
    /// Ports are not bound yet.
    Starting,
    /// No engine is connected to this side.
    NoEngine(Side, u32),
    /// The proxy has not called back lately, so it may not know this sidecar.
    NoProxy(String),
    /// The process is about to end.
    Draining,
}

/// One side of one rank.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RankStatus {
    /// The side's name.
    pub(crate) side: &'static str,
    /// The rank.
    pub(crate) rank: u32,
    /// Engine connections.
    pub(crate) engines: usize,
    /// What a chunk looks like; absent until an engine has said.
    pub(crate) layout: Option<Layout>,
    /// The epoch of the buffer's cut; 0 until an engine is there.
    pub(crate) epoch: Epoch,
    /// Slots; 0 until an engine is there.
    pub(crate) slots: u32,
    /// Bytes of a slot.
    pub(crate) slot_bytes: u64,
    /// Slots free.
    pub(crate) free: u32,
    /// Slots granted.
    pub(crate) held: u32,
    /// Slots into which an unfenced peer may still write.
    pub(crate) quarantined: u32,
    /// Requests under way.
    pub(crate) requests: u32,
    /// Tokens of decode requests that are parked.
    pub(crate) parked_tokens: u64,
}

/// One link of a sender.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct LinkRow {
    /// The rank that it belongs to.
    pub(crate) rank: u32,
    /// `host:alloc_port`.
    pub(crate) peer: String,
    /// The receiver's name.
    pub(crate) id: String,
    /// As configured here.
    pub(crate) configured: &'static str,
    /// The wire that was chosen.
    pub(crate) transport: &'static str,
    /// Why that one.
    pub(crate) why: String,
    /// What the library says it uses underneath.
    pub(crate) reported: String,
    /// GB/s (10⁹ bytes) of recent writes; absent before the first.
    pub(crate) measured_gb_per_s: Option<f64>,
}

/// One request that has ended.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RecordRow {
    /// The side's name.
    pub(crate) side: &'static str,
    /// The rank.
    pub(crate) rank: u32,
    /// What the machine said.
    #[serde(flatten)]
    pub(crate) record: Record,
}

/// Everything at one moment, for `/status`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Snapshot {
    /// The sidecar's name.
    pub(crate) id: String,
    /// This start.
    pub(crate) epoch: Epoch,
    /// `sender`, `receiver` or `both`.
    pub(crate) role: &'static str,
    /// The binary's version.
    pub(crate) version: &'static str,
    /// A push would work.
    pub(crate) ready: bool,
    /// Why not.
    pub(crate) reasons: Vec<String>,
    /// Every side of every rank.
    pub(crate) ranks: Vec<RankStatus>,
    /// Every link.
    pub(crate) links: Vec<LinkRow>,
    /// The proxy, if one is configured.
    pub(crate) proxy: Option<ProxyStatus>,
}

/// The proxy as this sidecar knows it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ProxyStatus {
    /// Its registration port.
    pub(crate) address: String,
    /// The name under which it last called back; empty before it did.
    pub(crate) name: String,
    /// Milliseconds since it called back.
    pub(crate) acknowledged_ms_ago: Option<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    bound: bool,
    draining: bool,
    ranks: BTreeMap<(Side, u32), RankStatus>,
    links: BTreeMap<u32, Vec<LinkRow>>,
    records: VecDeque<RecordRow>,
    acknowledged: Option<(Instant, String)>,
}

impl Status {
    /// Of a process that has not bound its ports yet.
    pub(crate) fn new(config: &Config) -> Self {
        let mut sides = Vec::new();
        for rank in 0..config.ranks {
            if config.sends() {
                sides.push((Side::Sender, rank));
            }
            if config.receives() {
                sides.push((Side::Receiver, rank));
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

    /// The state of a side after an event.
    pub(crate) fn gauges(&self, side: Side, rank: u32, gauges: &Gauges<'_>) {
        let mut inner = self.inner();
        let status = inner
            .ranks
            .entry((side, rank))
            .or_insert_with(|| RankStatus::new(side, rank));
        let had_engine = status.engines > 0;
        status.update(gauges);
        let has_engine = status.engines > 0;
        drop(inner);
        if had_engine != has_engine {
            self.changed.notify_one();
        }
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
    pub(crate) fn record(&self, side: Side, rank: u32, record: &Record) {
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
            ranks: inner.ranks.values().cloned().collect(),
            links: inner.links.values().flatten().cloned().collect(),
            proxy: self.about.proxy.clone().map(|address| ProxyStatus {
                address,
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
        if let Some(proxy) = &about.proxy {
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

impl RankStatus {
    fn new(side: Side, rank: u32) -> Self {
        Self {
            side: side.as_str(),
            rank,
            engines: 0,
            layout: None,
            epoch: Epoch(0),
            slots: 0,
            slot_bytes: 0,
            free: 0,
            held: 0,
            quarantined: 0,
            requests: 0,
            parked_tokens: 0,
        }
    }

    fn update(&mut self, gauges: &Gauges<'_>) {
        if let Some(cut) = gauges.cut
            && cut.epoch != self.epoch
        {
            self.layout = Some(cut.layout.clone());
            self.epoch = cut.epoch;
            self.slots = cut.slots;
            self.slot_bytes = cut.slot_bytes;
        }
        self.engines = gauges.engines;
        self.free = gauges.free;
        self.held = gauges.held;
        self.quarantined = gauges.quarantined;
        self.requests = gauges.requests;
        self.parked_tokens = gauges.parked_tokens;
    }
}

impl LinkRow {
    fn new(rank: u32, link: &LinkStatus) -> Self {
        Self {
            rank,
            peer: link.peer.clone(),
            id: link.id.clone(),
            configured: link.configured,
            transport: link.transport,
            why: link.why.clone(),
            reported: link.reported.clone(),
            measured_gb_per_s: link.rate(),
        }
    }

    fn is_of(&self, link: &LinkStatus) -> bool {
        self.peer == link.peer
            && self.id == link.id
            && self.transport == link.transport
            && self.why == link.why
            && self.reported == link.reported
    }
}

impl fmt::Display for NotReady {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Starting => f.write_str("ports are not bound yet"),
            Self::NoEngine(side, rank) => {
                write!(
                    f,
                    "no engine is connected to the {} of rank {rank}",
                    side.as_str()
                )
            }
            Self::NoProxy(proxy) => write!(
                f,
                "the proxy at {proxy} has not acknowledged this sidecar within {} s",
                ACKNOWLEDGED_FOR.as_secs()
            ),
            Self::Draining => f.write_str("draining"),
        }
    }
}

/// Three of the proxy's call-backs, which come every 5 s.
pub(crate) const ACKNOWLEDGED_FOR: Duration = Duration::from_secs(15);

/// Requests that `/requests` shows: some minutes of a busy instance in about 64 KiB.
pub(crate) const MAX_RECORDS: usize = 256;

#[cfg(test)]
pub(crate) mod tests;
