//! The JSON shapes of `/status` and `/requests`, and the reasons why a sidecar is not ready.

use std::fmt;
use std::time::Duration;

use protocol::record::Record;
use protocol::{Epoch, Layout, RequestId};
use serde::Serialize;

use crate::config::Channel;
use crate::observe::listening::Listens;
use crate::rank::context::{Gauges, LinkStatus, RankRole};

/// A reason why the engine must not get requests now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotReady {
    /// Ports are not bound yet.
    Starting,
    /// No engine is connected to this role of this rank.
    NoEngine(RankRole, u32),
    /// The thread that serves a wire has ended.
    WireEnded(RankRole, u32, &'static str),
    /// The proxy has not called back lately, so perhaps it does not know this sidecar. The second text is the reason that
    /// the proxy gave; empty if it gave none.
    NoProxy(String, String),
    /// The process is draining and will end.
    Draining,
}

/// The state of one role of one rank.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RankStatus {
    /// `sender` or `receiver`.
    pub(crate) side: &'static str,
    /// The rank.
    pub(crate) rank: u32,
    /// Number of engine connections.
    pub(crate) engines: usize,
    /// The reason why the engine moves no KV; absent if it moves KV.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unmoved: Option<String>,
    /// The layout of a chunk; absent until an engine has connected.
    pub(crate) layout: Option<Layout>,
    /// The epoch of the slot layout; 0 until an engine has connected.
    pub(crate) epoch: Epoch,
    /// Number of slots; 0 until an engine has connected.
    pub(crate) slots: u32,
    /// Bytes of a slot.
    pub(crate) slot_bytes: u64,
    /// Number of free slots.
    pub(crate) free: u32,
    /// Number of slots that are granted to a request.
    pub(crate) held: u32,
    /// Number of slots that are not reused yet, because a peer may still write into them.
    pub(crate) quarantined: u32,
    /// Number of requests in flight.
    pub(crate) requests: u32,
    /// Sum of the tokens of parked decode requests.
    pub(crate) parked_tokens: u64,
    /// Sender: number of requests whose KV the engine keeps until a decode side fetches it.
    pub(crate) kept: u32,
    /// Sender: sum of the tokens of these requests.
    pub(crate) kept_tokens: u64,
    /// Receiver: number of decode requests whose KV a prefill side keeps.
    pub(crate) expected: u32,
}

/// One link of a sender.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct LinkRow {
    /// The sender's rank.
    pub(crate) rank: u32,
    /// Address of the receiver, `host:alloc_port`.
    pub(crate) peer: String,
    /// The receiver's name.
    pub(crate) id: String,
    /// The configured transport, such as `auto` or `tcp`.
    pub(crate) configured: &'static str,
    /// The wire that was chosen.
    pub(crate) transport: &'static str,
    /// The reason for the choice of the wire.
    pub(crate) why: String,
    /// The library's report about itself. For NIXL, the report has `UCX_TLS` and UCX's estimate of the rate.
    /// Neither value proves which wire UCX uses.
    pub(crate) reported: String,
    /// GB/s (10⁹ bytes) of recent writes; absent before the first write.
    pub(crate) measured_gb_per_s: Option<f64>,
}

/// One request that has ended.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RecordRow {
    /// `sender` or `receiver`.
    pub(crate) side: &'static str,
    /// The rank.
    pub(crate) rank: u32,
    /// The record that the protocol machine made.
    #[serde(flatten)]
    pub(crate) record: Record,
}

/// One request of `/requests`.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum RequestRow {
    /// The request has ended.
    Ended(RecordRow),
    /// The prefill engine keeps the request's KV.
    Kept(KeptRow),
}

/// One request whose KV the prefill engine keeps until a decode side fetches it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct KeptRow {
    /// `sender`.
    pub(crate) side: &'static str,
    /// The rank.
    pub(crate) rank: u32,
    /// The id of the request at the prefill engine.
    pub(crate) req: RequestId,
    /// Number of tokens that the engine has computed.
    pub(crate) tokens: u32,
    /// Milliseconds since the engine's last step for the request.
    pub(crate) kept_ms: u64,
}

/// Everything at one moment, for `/status`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Snapshot {
    /// The sidecar's name.
    pub(crate) id: String,
    /// Random number that is new at each start of the process.
    pub(crate) epoch: Epoch,
    /// `sender`, `receiver` or `both`.
    pub(crate) role: &'static str,
    /// The binary's version.
    pub(crate) version: &'static str,
    /// True if the engine may be given requests.
    pub(crate) ready: bool,
    /// The reasons why the sidecar is not ready; empty if it is ready.
    pub(crate) reasons: Vec<String>,
    /// The reason why a ready sidecar moves no KV; absent if it moves KV.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) unmoved: Option<String>,
    /// Every role of every rank.
    pub(crate) ranks: Vec<RankStatus>,
    /// Every link.
    pub(crate) links: Vec<LinkRow>,
    /// Every socket on which this process listens.
    pub(crate) listens: Vec<Listens>,
    /// Every channel of the configuration, with the check that a peer must pass.
    pub(crate) channels: Vec<Channel>,
    /// The proxy; absent if none is configured.
    pub(crate) proxy: Option<ProxyStatus>,
}

/// The proxy as this sidecar knows it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ProxyStatus {
    /// The proxy's registration port.
    pub(crate) address: String,
    /// True if the proxy acknowledges registrations. False for LMCache's proxy, which readiness does not wait
    /// for.
    pub(crate) calls_back: bool,
    /// The proxy's name in its last call-back; empty before the first call-back.
    pub(crate) name: String,
    /// The reason why the proxy has not confirmed this sidecar; absent if it has, and if it proves no key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trouble: Option<String>,
    /// Milliseconds since the proxy's last call-back, or with keys since its last confirmation; absent before the first call-back.
    pub(crate) acknowledged_ms_ago: Option<u64>,
}

impl RankStatus {
    pub(super) fn new(role: RankRole, rank: u32) -> Self {
        Self {
            side: role.as_str(),
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
            kept: 0,
            kept_tokens: 0,
            expected: 0,
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
        self.kept = gauges.kept;
        self.kept_tokens = gauges.kept_tokens;
        self.expected = gauges.expected;
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
            Self::NoEngine(role, rank) => {
                write!(
                    f,
                    "no engine is connected to the {} of rank {rank}",
                    role.as_str()
                )
            }
            Self::WireEnded(role, rank, wire) => write!(
                f,
                "the thread of transport {wire} of the {} of rank {rank} has ended: see its error on \
                 standard error, and restart this sidecar",
                role.as_str()
            ),
            Self::NoProxy(proxy, trouble) => {
                let colon = if trouble.is_empty() { "" } else { ": " };
                write!(
                    f,
                    "the proxy at {proxy} has not acknowledged this sidecar within {} s{colon}{trouble}",
                    ACKNOWLEDGED_FOR.as_secs()
                )
            }
            Self::Draining => f.write_str("draining"),
        }
    }
}

/// The sidecar stays ready for this time after the proxy's last call-back: three periods of 5 s.
pub(crate) const ACKNOWLEDGED_FOR: Duration = Duration::from_secs(15);
