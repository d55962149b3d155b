//! What is shown: the shapes of `/status` and `/requests`, and why a sidecar is not ready.

use std::fmt;
use std::time::Duration;

use protocol::record::Record;
use protocol::{Epoch, Layout};
use serde::Serialize;

use crate::observe::listening::Listens;
use crate::rank::context::{Gauges, LinkStatus, RankRole};

/// Why the engine may not be given requests now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotReady {
    /// Ports are not bound yet.
    Starting,
    /// No engine is connected to this side.
    NoEngine(RankRole, u32),
    /// The thread behind a wire has ended.
    WireEnded(RankRole, u32, &'static str),
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
    /// Why the engine moves no KV; absent if it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unmoved: Option<String>,
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
    /// The library's word on itself: of NIXL `UCX_TLS` and UCX's estimate, not the wire in use.
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
    /// The engine may be given requests.
    pub(crate) ready: bool,
    /// Why not.
    pub(crate) reasons: Vec<String>,
    /// Why nothing is moved although it is ready; absent if KV is moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unmoved: Option<String>,
    /// Every side of every rank.
    pub(crate) ranks: Vec<RankStatus>,
    /// Every link.
    pub(crate) links: Vec<LinkRow>,
    /// Every socket on which this process listens.
    pub(crate) listens: Vec<Listens>,
    /// The proxy, if one is configured.
    pub(crate) proxy: Option<ProxyStatus>,
}

/// The proxy as this sidecar knows it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ProxyStatus {
    /// Its registration port.
    pub(crate) address: String,
    /// It acknowledges registrations; false: it is LMCache's, and readiness does not wait for it.
    pub(crate) calls_back: bool,
    /// The name under which it last called back; empty before it did.
    pub(crate) name: String,
    /// Milliseconds since it called back.
    pub(crate) acknowledged_ms_ago: Option<u64>,
}

impl RankStatus {
    pub(super) fn new(side: RankRole, rank: u32) -> Self {
        Self {
            side: side.as_str(),
            rank,
            engines: 0,
            unmoved: None,
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

    pub(super) fn update(&mut self, gauges: &Gauges<'_>) {
        if let Some(slot_layout) = gauges.slot_layout
            && slot_layout.epoch != self.epoch
        {
            self.layout = Some(slot_layout.layout.clone());
            self.epoch = slot_layout.epoch;
            self.slots = slot_layout.slots;
            self.slot_bytes = slot_layout.slot_bytes;
        }
        self.engines = gauges.engines;
        if self.unmoved.as_deref() != gauges.unmoved {
            self.unmoved = gauges.unmoved.map(str::to_owned);
        }
        self.free = gauges.free;
        self.held = gauges.held;
        self.quarantined = gauges.quarantined;
        self.requests = gauges.requests;
        self.parked_tokens = gauges.parked_tokens;
    }
}

impl LinkRow {
    pub(super) fn new(rank: u32, link: &LinkStatus) -> Self {
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

    pub(super) fn is_of(&self, link: &LinkStatus) -> bool {
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
            Self::WireEnded(side, rank, wire) => write!(
                f,
                "the thread behind {wire} of the {} of rank {rank} has ended: its last words are on \
                 standard error, and only a restart of this sidecar helps",
                side.as_str()
            ),
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
