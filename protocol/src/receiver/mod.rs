//! The receiving side of the handshake: gives senders slots to write into, and tells the engine
//! when the slots may be read.
//!
//! A request has two sides: the decode engine *parks* the request, and a sender *asks* for slots.
//! Either side can come first.
//!
//! ```text
//!                     ┌────────── parked ──────────┐
//!   AllocRequest      │                            ▼
//!  ───────────────▶ Pending ── room / waited ──▶ Leased ── all Released ──▶ ended
//!                     │                            │ cancel, expiry, peer lost
//!                     └── refused ──▶ ended        ▼
//!                                     Open slots: freed when the sender confirms, or quarantined
//! ```
//!
//! *Parked grants* are a sliding window: each slot that becomes free goes to the next waiting lease
//! in turn, so a prompt of any length can pass through a buffer of any size. *Unparked grants*
//! contain all slots at once; if the slots are not free within the sender's timeout, the receiver
//! refuses the request. If the decode request has not come yet, the receiver first waits for at
//! most `park_ms`, because the decode request says which tokens the engine already has.
//!
//! The receiver tells the engine about a slot only after a `Written` with the id of the slot's
//! lease and the present epoch. The receiver frees a slot only when no peer can write into the slot
//! any more: after the sender's confirmation (`Written`, `CancelNotif`), or after a
//! [`Event::Fenced`] if the slot was quarantined.
//!
//! If the KV waits at a prefill side, the receiver asks that side to push it: see `fetch`.
//!
//! A duplicate of a message changes nothing. If a message is lost, its repetition or `Extend`
//! repairs the loss. The receiver answers an unknown lease with `Unwanted`.

mod ended;
mod engine;
mod events;
mod fetch;
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

use crate::plan::Chunking;
use crate::slots::Slots;
use crate::{EngineId, LeaseId, Reason, RequestId, SlotIndex, Time};

use ended::Ended;
use events::Owner;
pub use events::{Action, Config, Event, Gauges, Principal, Route, SenderId, Unchecked};
use fetch::Fetches;
use lmcache::Lmcache;
use reclaim::Readers;
use request::{Allocation, Chunk, Lease, Request};

/// State machine of one rank's receiving side: takes events and returns actions.
#[derive(Debug)]
pub struct Receiver {
    config: Config,
    chunking: Chunking,
    now: Time,
    slots: Slots,
    requests: BTreeMap<RequestId, Request>,
    leases: BTreeMap<LeaseId, RequestId>,
    /// The party to which each connection belongs.
    owners: BTreeMap<Route, Owner>,
    /// Requests that wait for slots, in the order in which they began to wait.
    waiting: VecDeque<RequestId>,
    quarantine: BTreeMap<LeaseId, Quarantine>,
    ended: Ended,
    /// Decode requests whose KV waits at a prefill side.
    fetches: Fetches,
    /// Senders whose KV was read recently.
    readers: Readers,
    /// Counter for new names of old requests. An old request gets a new name if its slots are still
    /// in use and a new request has its id.
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
    owner: Owner,
    slots: Vec<SlotIndex>,
}

impl Receiver {
    /// Returns a receiver with every slot free.
    pub fn new(config: Config) -> Self {
        Self {
            now: Time::default(),
            chunking: config.chunking(),
            slots: Slots::new(config.slots),
            requests: BTreeMap::new(),
            leases: BTreeMap::new(),
            owners: BTreeMap::new(),
            waiting: VecDeque::new(),
            quarantine: BTreeMap::new(),
            ended: Ended::default(),
            fetches: Fetches::default(),
            readers: Readers::default(),
            set_aside: 0,
            lmcache: Lmcache::default(),
            rng: StdRng::seed_from_u64(config.seed),
            draining: false,
            actions: VecDeque::new(),
            config,
        }
    }

    /// Handles one event. [`Self::poll_action`] then returns the resulting actions.
    pub fn handle(&mut self, now: Time, event: Event) {
        self.now = self.now.max(now);
        match event {
            Event::Peer { route, message } => self.on_message(route, message),
            Event::PeerLost { route } => self.on_peer_lost(route),
            Event::Connected {
                route,
                host,
                principal,
            } => {
                let owner = principal.map_or_else(|| Owner::host(&host), Owner::Principal);
                self.owners.insert(route, owner);
            }
            Event::Introduced {
                route,
                sender,
                linked,
            } => self.on_introduced(route, sender, linked),
            Event::CanaryChecked { gone, there } => self.on_canary_checked(&gone, &there),
            Event::Fenced { sender, lease } => self.on_fenced(&sender, lease),
            Event::Corrupt(lease) => self.on_corrupt(lease),
            Event::Expect(engine, message) => self.on_expect(engine, message),
            Event::Keeper { from, message } => self.on_keeper(&from, &message),
            Event::KeeperLost { from, reason } => self.on_keeper_lost(&from, reason),
            Event::Await(engine, message) => self.on_await(engine, message),
            Event::Release(engine, message) => self.on_release(engine, &message),
            Event::Abort(engine, message) => self.on_abort(engine, &message.req),
            Event::EngineGone(engine) => self.on_engine_gone(engine),
            Event::Deadline => {}
            Event::Drain => self.draining = true,
        }
        self.on_deadlines();
        self.on_fetch_deadlines();
        self.on_lmcache_deadlines();
        self.serve();
    }

    /// Returns the next action, in order; `None` if there is none.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Returns the time at which [`Event::Deadline`] is due; `None` if no timer runs.
    pub fn deadline(&self) -> Option<Time> {
        let requests = self.requests.values().filter_map(Request::deadline);
        let reclaim = self.reclaim_at();
        requests
            .chain(self.lmcache.deadline())
            .chain(reclaim)
            .chain(self.fetches.deadline())
            .min()
    }

    /// Returns the use of the landing buffer.
    pub fn gauges(&self) -> Gauges {
        let mut gauges = Gauges {
            free: self.slots.free(),
            expected: self.fetches.len(),
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

    /// Returns true if there is no request and no slot is held or quarantined.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
            && self.fetches.is_empty()
            && self.lmcache.is_idle()
            && self.slots.free() == self.slots.total()
    }

    /// Returns true if [`Event::Connected`] has come for a connection.
    pub fn is_connected(&self, route: Route) -> bool {
        self.owners.contains_key(&route)
    }

    /// Returns the principal of a lease; `None` if there is no such lease, or its peer has proved no key.
    pub fn principal_of(&self, lease: LeaseId) -> Option<&Principal> {
        let lease = self.requests.get(self.leases.get(&lease)?)?.lease()?;
        match &lease.owner {
            Owner::Principal(principal) => Some(principal),
            Owner::Host(_) | Owner::Unknown => None,
        }
    }

    /// Returns the party to which a connection belongs.
    fn owner_of(&self, route: Route) -> Owner {
        self.owners.get(&route).cloned().unwrap_or_default()
    }

    /// Returns the number of quarantined slots that one sender caused. A sender that has proved a key is known by its
    /// principal, because it may use any name for its ranks.
    fn quarantined_by(&self, sender: &str, owner: &Owner) -> usize {
        let is_of = |q: &&Quarantine| match owner {
            Owner::Principal(_) => q.owner == *owner,
            Owner::Host(_) | Owner::Unknown => q.sender.id == sender,
        };
        self.quarantine
            .values()
            .filter(is_of)
            .map(|q| q.slots.len())
            .sum()
    }

    fn free(&mut self, slot: SlotIndex) {
        self.slots.give(slot);
    }

    /// Closes a slot to writes, then frees it.
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
    /// Returns the next deadline of this request; `None` if it has none.
    fn deadline(&self) -> Option<Time> {
        let parked = self.parked.as_ref().map(|p| match self.allocation {
            Allocation::None => p.deadline.min(p.no_sender),
            Allocation::Pending(_) | Allocation::Leased(_) => p.deadline,
        });
        let allocation = match &self.allocation {
            Allocation::None => None,
            Allocation::Pending(pending) => Some(pending.park.unwrap_or(pending.wait)),
            // A parked request whose chunks are all written needs no more messages from its sender.
            Allocation::Leased(lease) if lease.is_written() && self.parked.is_some() => None,
            Allocation::Leased(lease) => Some(lease.deadline),
        };
        parked.into_iter().chain(allocation).min()
    }
}

/// Returns a time that a peer asks for (`lease_ms`, `wait_ms`, `park_ms`), but at most `max`.
fn bounded(ms: u32, max: Duration) -> Duration {
    Duration::from_millis(u64::from(ms)).min(max)
}
