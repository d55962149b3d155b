//! The state that this sidecar shows. `/ready`, `/status`, `/requests`, the gauges of `/metrics` and the
//! registrations all read this state.
//!
//! Each role of a rank updates the state after each event, so an update must be cheap: it holds a lock for a
//! short time, and allocates no memory if only numbers change. The lock is never held across an await.

mod shape;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::identity::Auth;
use common::zmq::{Listener, Traffic};
use protocol::record::Record;
use protocol::registration::{Leave, Register};
use protocol::{Epoch, VERSION};
use tokio::sync::Notify;

pub(crate) use self::shape::{
    ACKNOWLEDGED_FOR, KeptRow, LinkRow, NotReady, ProxyStatus, RankStatus, RecordRow, RequestRow,
    Snapshot,
};

use crate::config::{Channel, Config};
use crate::observe::listening::Listens;
use crate::rank::context::{Gauges, KeptStatus, LinkStatus, RankRole};
use crate::transport::set::Wires;

/// The state that the sidecar shows, behind a lock.
#[derive(Debug)]
pub(crate) struct Status {
    about: About,
    inner: Mutex<Inner>,
    changed: Notify,
}

/// The part of the state that does not change while the process lives.
#[derive(Clone, Debug)]
pub(crate) struct About {
    /// The sidecar's name.
    pub(crate) id: String,
    /// Random number that is new at each start of the process.
    pub(crate) epoch: Epoch,
    /// `sender`, `receiver` or `both`.
    pub(crate) role: &'static str,
    /// Every role of every rank.
    pub(crate) roles: Vec<(RankRole, u32)>,
    /// The proxy's registration port; absent without a proxy.
    pub(crate) proxy: Option<String>,
    /// True if the proxy must prove a key, so that only its answers on the registration channel count.
    pub(crate) proxy_proves_key: bool,
    /// Every channel with its protection.
    pub(crate) channels: Vec<Channel>,
}

/// A counter of events on a wire, or a current number, such as the number of a wire's peers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WireEvent {
    /// The role of the rank: sender or receiver.
    pub(crate) role: RankRole,
    /// The rank.
    pub(crate) rank: u32,
    /// The wire's name.
    pub(crate) transport: &'static str,
    /// The event's name.
    pub(crate) event: &'static str,
    /// Number of events since the start, or the current number.
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
    kept: BTreeMap<u32, Vec<KeptStatus>>,
    records: VecDeque<RecordRow>,
    /// Time of the proxy's last acknowledgement.
    acknowledged: Option<Instant>,
    /// The proxy's name in its last call-back; empty before the first.
    name: String,
    /// The proxy's last answer: the reason why it has not confirmed this sidecar, empty if it has; `None` before the first
    /// answer.
    trouble: Option<String>,
    /// The kind of proxy that was connected last.
    listener: Option<Listener>,
    listens: Vec<Listens>,
}

impl Status {
    /// Makes the state of a process that has not bound its ports yet.
    pub(crate) fn new(config: &Config) -> Self {
        let mut roles = Vec::new();
        for rank in 0..config.ranks {
            if config.sends() {
                roles.push((RankRole::Sender, rank));
            }
            if config.receives() {
                roles.push((RankRole::Receiver, rank));
            }
        }
        let ranks = roles
            .iter()
            .map(|&(role, rank)| ((role, rank), RankStatus::new(role, rank)))
            .collect();
        Self {
            about: About {
                id: config.id.clone(),
                epoch: Epoch(rand::random_range(1..=u64::MAX)),
                role: config.role.as_str(),
                roles,
                proxy: config.proxy.as_ref().map(|p| p.address.to_string()),
                proxy_proves_key: config.identity.as_ref().map(|i| i.auth()) == Some(Auth::Require),
                channels: config.channels(),
            },
            inner: Mutex::new(Inner {
                ranks,
                ..Inner::default()
            }),
            changed: Notify::new(),
        }
    }

    /// Returns the part of the state that does not change.
    pub(crate) fn about(&self) -> &About {
        &self.about
    }

    /// Notes that every port is bound.
    pub(crate) fn bound(&self) {
        self.inner().bound = true;
        self.changed.notify_one();
    }

    /// Notes that the sidecar accepts no new requests.
    pub(crate) fn draining(&self) {
        self.inner().draining = true;
        self.changed.notify_one();
    }

    /// Notes that the proxy has called back. With `sidecar.auth: require` the call proves nothing, because the HTTP call
    /// of a stranger would look the same: then the proxy's answers on the registration channel count.
    pub(crate) fn acknowledged(&self, proxy: &str, now: Instant) {
        let mut inner = self.inner();
        proxy.clone_into(&mut inner.name);
        if !self.about.proxy_proves_key {
            inner.acknowledged = Some(now);
        }
    }

    /// Notes the proxy's answer to the registration. Returns the trouble if it has changed; an empty text means that the
    /// proxy has confirmed the registration.
    pub(crate) fn answered(
        &self,
        confirmed: bool,
        trouble: String,
        now: Instant,
    ) -> Option<String> {
        let mut inner = self.inner();
        if confirmed {
            inner.acknowledged = Some(now);
        } else if trouble.is_empty() {
            return None; // the first call-back is still under way
        }
        if inner.trouble.as_deref() == Some(&*trouble) {
            return None;
        }
        inner.trouble = Some(trouble.clone());
        Some(trouble)
    }

    /// Notes the kind of proxy that is connected. A proxy that is away may come back, so `Nobody` is not
    /// noted. Returns true if the kind has changed.
    pub(crate) fn listens_to_us(&self, listener: Listener) -> bool {
        let mut inner = self.inner();
        if listener == Listener::Nobody || inner.listener == Some(listener) {
            return false;
        }
        inner.listener = Some(listener);
        true
    }

    /// Notes every socket on which this process listens.
    pub(crate) fn listens(&self, sockets: Vec<Listens>) {
        self.inner().listens = sockets;
    }

    /// Updates the state of one role of a rank after an event.
    pub(crate) fn gauges(&self, role: RankRole, rank: u32, gauges: &Gauges<'_>) {
        let mut inner = self.inner();
        let status = inner
            .ranks
            .entry((role, rank))
            .or_insert_with(|| RankStatus::new(role, rank));
        let said =
            |status: &RankStatus| (status.engines > 0, status.epoch, status.unmoved.is_some());
        let before = said(status);
        status.update(gauges);
        let after = said(status);
        drop(inner);
        // The proxy uses these values to pair instances, so a change is registered at once.
        if before != after {
            self.changed.notify_one();
        }
    }

    /// Notes the wires of one role of a rank.
    pub(crate) fn wires(&self, role: RankRole, rank: u32, wires: Wires) {
        self.inner().wires.insert((role, rank), wires);
    }

    /// Returns the counters of every wire.
    pub(crate) fn wire_events(&self) -> Vec<WireEvent> {
        let wires = self.inner().wires.clone();
        let mut all = Vec::new();
        for ((role, rank), wires) in wires {
            all.extend(
                wires
                    .events()
                    .into_iter()
                    .map(|(transport, event, count)| WireEvent {
                        role,
                        rank,
                        transport,
                        event,
                        count,
                    }),
            );
        }
        all
    }

    /// Notes a bound port and its counters.
    pub(crate) fn port(&self, rank: u32, port: &'static str, traffic: Traffic) {
        self.inner().ports.insert((rank, port), traffic);
    }

    /// Returns the bound ports by rank and name.
    pub(crate) fn ports(&self) -> BTreeMap<(u32, &'static str), Traffic> {
        self.inner().ports.clone()
    }

    /// Updates the links of a sender's rank after an event.
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

    /// Replaces the kept requests of a sender's rank.
    pub(crate) fn kept(&self, rank: u32, requests: &mut dyn Iterator<Item = KeptStatus>) {
        let mut inner = self.inner();
        let kept = inner.kept.entry(rank).or_default();
        kept.clear();
        kept.extend(requests);
    }

    /// Adds the record of a request that has ended.
    pub(crate) fn record(&self, role: RankRole, rank: u32, record: &Record) {
        let row = RecordRow {
            side: role.as_str(),
            rank,
            record: record.clone(),
        };
        let records = &mut self.inner().records;
        if records.len() == MAX_RECORDS {
            records.pop_front();
        }
        records.push_back(row);
    }

    /// Returns the records of the last [`MAX_RECORDS`] ended requests, oldest first, and then all requests
    /// whose KV is kept, longest kept first.
    pub(crate) fn requests(&self, now: Instant) -> Vec<RequestRow> {
        let inner = self.inner();
        let mut kept: Vec<(u32, &KeptStatus)> = inner
            .kept
            .iter()
            .flat_map(|(&rank, kept)| kept.iter().map(move |k| (rank, k)))
            .collect();
        kept.sort_by_key(|(_, k)| k.since);
        let ended = inner.records.iter().cloned().map(RequestRow::Ended);
        let kept = kept.into_iter().map(|(rank, k)| {
            let age = now.saturating_duration_since(k.since).as_millis();
            RequestRow::Kept(KeptRow {
                side: RankRole::Sender.as_str(),
                rank,
                req: k.req.clone(),
                tokens: k.tokens,
                kept_ms: u64::try_from(age).unwrap_or(u64::MAX),
            })
        });
        ended.chain(kept).collect()
    }

    /// Returns the reasons why a push would not work now; empty if a push would work.
    pub(crate) fn obstacles(&self, now: Instant) -> Vec<NotReady> {
        self.inner().obstacles(&self.about, now)
    }

    /// Returns the whole state at this moment.
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
            channels: self.about.channels.clone(),
            proxy: self.about.proxy.clone().map(|address| ProxyStatus {
                address,
                trouble: inner.trouble.clone().filter(|trouble| !trouble.is_empty()),
                calls_back: inner.listener != Some(Listener::Lmcache),
                name: inner.name.clone(),
                acknowledged_ms_ago: inner.acknowledged.map(|at| {
                    u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX)
                }),
            }),
        }
    }

    /// Returns the registration at this moment. `admin_port` is the port that the admin server bound.
    pub(crate) fn registration(&self, config: &Config, admin_port: u16, now: Instant) -> Register {
        let inner = self.inner();
        // The registration must come before the proxy's acknowledgement, so a missing acknowledgement does
        // not count as a reason against readiness in the registration.
        let ready = inner
            .obstacles(&self.about, now)
            .iter()
            .all(|o| matches!(o, NotReady::NoProxy(..)));
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
            release: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// Returns the message with which this sidecar tells the proxy that it leaves on purpose.
    pub(crate) fn leave(&self) -> Leave {
        Leave {
            id: self.about.id.clone(),
            epoch: self.about.epoch,
        }
    }

    /// Waits until a value that readiness depends on has changed since the last call.
    ///
    /// # Cancel safety
    /// A change is not lost when the future is dropped.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // After a panic in another thread the numbers lack at most one event, so a poisoned lock is still
        // used.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Returns the reason why an engine moves no KV; absent if every engine moves KV.
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
        for (&(role, rank), status) in &self.ranks {
            if status.engines == 0 {
                obstacles.push(NotReady::NoEngine(role, rank));
            }
        }
        for (&(role, rank), wires) in &self.wires {
            if let Some(wire) = wires.ended() {
                obstacles.push(NotReady::WireEnded(role, rank, wire));
            }
        }
        // LMCache's proxy cannot acknowledge anything.
        if let Some(proxy) = &about.proxy
            && self.listener != Some(Listener::Lmcache)
        {
            let lately = self
                .acknowledged
                .is_some_and(|at| now.saturating_duration_since(at) <= ACKNOWLEDGED_FOR);
            if !lately {
                let trouble = self.trouble.clone().unwrap_or_default();
                obstacles.push(NotReady::NoProxy(proxy.clone(), trouble));
            }
        }
        obstacles
    }
}

/// Number of records that `/requests` shows: some minutes of a busy instance in about 64 KiB.
pub(crate) const MAX_RECORDS: usize = 256;

#[cfg(test)]
pub(crate) mod tests;
