//! The receiving side of the handshake: who may write into which slot, and when it may be read.
//!
//! A request is known from two sides, in either order: the decode engine *parks* it, a sender *asks*
//! for slots.
//!
//! ```text
//!                     ┌────────── parked ──────────┐
//!   AllocRequest      │                            ▼
//!  ───────────────▶ Pending ── room / waited ──▶ Leased ── all Released ──▶ ended
//!                     │                            │ cancel, expiry, peer lost
//!                     └── refused ──▶ ended        ▼
//!                                     Open slots: freed by the sender's word, or quarantined
//! ```
//!
//! *Parked grants* are a sliding window: each slot that becomes free goes to a waiting lease, in
//! turn, so any prompt fits any buffer. *Unparked grants* are all or nothing within the sender's
//! wait. A request that nobody parks is held back for `park_ms` first, because a decode request
//! that has parked says what it holds already.
//!
//! A slot is told to the engine only after `Written` with the lease's id and this epoch. It goes
//! back to the pool only when no peer can still write into it: after the sender's word (`Written`,
//! `CancelNotif`), or after a [`Event::Fenced`] for what was quarantined.
//!
//! A duplicate of any message changes nothing; a lost one is repaired by its repetition or by
//! `Extend`; an unknown lease is answered with `Unwanted`.

mod ended;
mod engine;
mod events;
mod grant;
mod lmcache;
mod on_peer;
mod reclaim;
mod request;
mod teardown;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::{EngineId, LeaseId, Reason, RequestId, SlotIndex, Time};

use crate::slots::Slots;
use ended::Ended;
pub use events::{Action, Config, Event, Gauges, Route, SenderId, Unchecked};
use lmcache::Lmcache;
use reclaim::Readers;
use request::{Allocation, Chunk, Lease, Request};

/// The receiving side of one rank. See the module's documentation.
#[derive(Debug)]
pub struct Receiver {
    config: Config,
    now: Time,
    slots: Slots,
    requests: BTreeMap<RequestId, Request>,
    leases: BTreeMap<LeaseId, RequestId>,
    /// Where connections come from, by their own addresses and not by what they say.
    hosts: BTreeMap<Route, String>,
    /// Requests that want slots, in the order in which they came to want them.
    waiting: VecDeque<RequestId>,
    quarantine: BTreeMap<LeaseId, Quarantine>,
    ended: Ended,
    /// Senders whose KV has been read.
    readers: Readers,
    /// Numbers requests whose id was given anew while their last slots were still under way.
    set_aside: u64,
    lmcache: Lmcache,
    rng: StdRng,
    draining: bool,
    actions: VecDeque<Action>,
}

/// Slots of an ended lease into which a write may still arrive.
#[derive(Debug)]
struct Quarantine {
    sender: SenderId,
    host: String,
    slots: Vec<SlotIndex>,
}

impl Receiver {
    /// A receiver with every slot free.
    pub fn new(config: Config) -> Self {
        Self {
            now: Time::default(),
            slots: Slots::new(config.slots),
            requests: BTreeMap::new(),
            leases: BTreeMap::new(),
            hosts: BTreeMap::new(),
            waiting: VecDeque::new(),
            quarantine: BTreeMap::new(),
            ended: Ended::default(),
            readers: Readers::default(),
            set_aside: 0,
            lmcache: Lmcache::default(),
            rng: StdRng::seed_from_u64(config.seed),
            draining: false,
            actions: VecDeque::new(),
            config,
        }
    }

    /// Takes in one event. Actions wait in [`Self::poll_action`] afterwards.
    pub fn handle(&mut self, now: Time, event: Event) {
        self.now = self.now.max(now);
        match event {
            Event::Peer { route, message } => self.on_message(route, message),
            Event::PeerLost { route } => self.on_peer_lost(route),
            Event::Connected { route, host } => drop(self.hosts.insert(route, host)),
            Event::Introduced {
                route,
                sender,
                linked,
            } => self.on_introduced(route, sender, linked),
            Event::CanaryChecked { gone, there } => self.on_canary_checked(&gone, &there),
            Event::Fenced { sender, lease } => self.on_fenced(&sender, lease),
            Event::Corrupt(lease) => self.on_corrupt(lease),
            Event::Await(engine, message) => self.on_await(engine, message),
            Event::Release(engine, message) => self.on_release(engine, &message),
            Event::Abort(engine, message) => self.on_abort(engine, &message.req),
            Event::EngineGone(engine) => self.on_engine_gone(engine),
            Event::Deadline => {}
            Event::Drain => self.draining = true,
        }
        self.on_deadlines();
        self.on_lmcache_deadlines();
        self.serve();
    }

    /// The next thing to do, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Event::Deadline`] is due at the latest.
    pub fn deadline(&self) -> Option<Time> {
        let requests = self.requests.values().filter_map(Request::deadline);
        let reclaim = self.reclaim_at();
        requests.chain(self.lmcache.deadline()).chain(reclaim).min()
    }

    /// What the buffer holds now.
    pub fn gauges(&self) -> Gauges {
        let mut gauges = Gauges {
            free: self.slots.free(),
            requests: u32::try_from(self.requests.len()).unwrap_or(u32::MAX),
            ..Gauges::default()
        };
        for quarantine in self.quarantine.values() {
            gauges.quarantined += u32::try_from(quarantine.slots.len()).unwrap_or(u32::MAX);
        }
        gauges.held += u32::try_from(self.lmcache.held()).unwrap_or(u32::MAX);
        gauges.writing += u32::try_from(self.lmcache.writing()).unwrap_or(u32::MAX);
        for request in self.requests.values() {
            gauges.held += u32::try_from(request.lent.len()).unwrap_or(u32::MAX);
            if let Some(parked) = &request.parked {
                gauges.parked_tokens += u64::from(parked.tokens);
            }
            for chunk in request.lease().map_or(&[][..], |l| &l.chunks) {
                gauges.held += u32::from(chunk.slot().is_some());
                gauges.writing += u32::from(matches!(chunk, Chunk::Open { writing: true, .. }));
            }
        }
        gauges
    }

    /// Nothing is under way: no request known, no slot held or quarantined.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
            && self.lmcache.is_idle()
            && self.slots.free() == self.slots.total()
    }

    /// Whether [`Event::Connected`] was said of a connection.
    pub fn is_connected(&self, route: Route) -> bool {
        self.hosts.contains_key(&route)
    }

    /// The address behind a connection; empty if it is not known.
    fn host_of(&self, route: Route) -> String {
        self.hosts.get(&route).cloned().unwrap_or_default()
    }

    /// Slots that one sender left quarantined.
    fn quarantined_by(&self, sender: &str) -> usize {
        self.quarantine
            .values()
            .filter(|q| q.sender.id == sender)
            .map(|q| q.slots.len())
            .sum()
    }

    fn free(&mut self, slot: SlotIndex) {
        self.slots.give(slot);
    }

    /// Closes a slot to writes, then gives it back.
    fn close_and_free(&mut self, slot: SlotIndex) {
        self.actions.push_back(Action::Close { slot });
        self.free(slot);
    }

    fn tell_ended(
        &mut self,
        engine: EngineId,
        req: &RequestId,
        reason: Option<Reason>,
        bytes: u64,
    ) {
        let ended = crate::local::Ended {
            req: req.clone(),
            reason,
            bytes,
        };
        self.actions.push_back(Action::Ended(engine, ended));
    }
}

impl Request {
    /// The next time at which something about this request runs out.
    fn deadline(&self) -> Option<Time> {
        let parked = self.parked.as_ref().map(|p| match self.allocation {
            Allocation::None => p.deadline.min(p.no_sender),
            Allocation::Pending(_) | Allocation::Leased(_) => p.deadline,
        });
        let allocation = match &self.allocation {
            Allocation::None => None,
            Allocation::Pending(pending) => Some(pending.park.unwrap_or(pending.wait)),
            // A lease that is written in full and parked needs no more words of its sender.
            Allocation::Leased(lease) if lease.is_written() && self.parked.is_some() => None,
            Allocation::Leased(lease) => Some(lease.deadline),
        };
        parked.into_iter().chain(allocation).min()
    }
}

/// `lease_ms`, `wait_ms`, `park_ms` as a peer states them, bounded.
fn bounded(ms: u32, max: Duration) -> Duration {
    Duration::from_millis(u64::from(ms)).min(max)
}
