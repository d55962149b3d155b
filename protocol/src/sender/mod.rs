//! The sending side of the handshake: from the engine's reservation to the receiver's last
//! acknowledgement.
//!
//! `Phase` has the states of a request, and `Chunk` has the states of a chunk. The rules:
//!
//! * The sender gives a chunk a send slot only when the receiver has granted a slot for the chunk
//!   *and* the engine is about to complete the chunk. So no send slot stays empty for a long time
//!   while other chunks need a send slot.
//! * The sender sends `Written` only after the transport has reported the flush. The sender repeats
//!   `Written` until `Ack` comes.
//! * If a lease ends early, the sender waits for the end of its writes in flight and then sends
//!   `CancelNotif`. The list `dirty` of this message has the slots of writes whose end is unknown.
//! * A request that names no receiver is kept in the engine's blocks until a decode side fetches it:
//!   see `kept`.
//! * The sender answers a message about an unknown lease with `CancelNotif`: no write is in flight
//!   under the lease, except into the slots that `graves` remembers.

mod engine;
mod events;
mod kept;
mod lmcache;
mod on_peer;
mod push;
mod request;
mod teardown;

use std::collections::{BTreeMap, VecDeque};

use crate::local::Target;
use crate::message::ToReceiver;
use crate::plan::Chunking;
use crate::slots::Slots;
use crate::{EngineId, Epoch, LeaseId, Reason, RequestId, Time, TransferId};

pub use events::{Action, After, Config, Event, FetcherId, Gauges, Piece, WatchId};
pub use kept::KeptRequest;
use kept::Store;
use lmcache::Foreign;
use request::{Phase, Request};
use teardown::PATIENCE;

/// State machine of one rank's sending side: takes events and returns actions.
#[derive(Debug)]
pub struct Sender {
    config: Config,
    chunking: Chunking,
    now: Time,
    slots: Slots,
    requests: BTreeMap<RequestId, Request>,
    /// KV that waits for a decode side.
    store: Store,
    links: BTreeMap<Target, Link>,
    transfers: BTreeMap<TransferId, RequestId>,
    /// Ended leases and their dirty slots, for the answers to receivers that ask late.
    graves: VecDeque<(LeaseId, Vec<u32>)>,
    next_seq: u64,
    next_transfer: u64,
    next_watch: u64,
    next_order: u64,
    draining: bool,
    actions: VecDeque<Action>,
}

/// The connection to a receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Link {
    /// The init handshake has been in flight since this time.
    Making(Time),
    /// The handshake is done.
    Up { epoch: Epoch, transport: String },
    /// The handshake with an LMCache receiver is done.
    Lmcache(Foreign),
}

/// Number of ended leases that the sender remembers.
const GRAVES: usize = 1024;

impl Sender {
    /// Returns a sender with every slot free.
    pub fn new(config: Config) -> Self {
        Self {
            now: Time::default(),
            chunking: Chunking::of(&config.layout),
            slots: Slots::new(config.slots),
            requests: BTreeMap::new(),
            store: Store::default(),
            links: BTreeMap::new(),
            transfers: BTreeMap::new(),
            graves: VecDeque::new(),
            next_seq: 1,
            next_transfer: 1,
            next_watch: 1,
            next_order: 1,
            draining: false,
            actions: VecDeque::new(),
            config,
        }
    }

    /// Handles one event. [`Self::poll_action`] then returns the resulting actions.
    pub fn handle(&mut self, now: Time, event: Event) {
        self.now = self.now.max(now);
        match event {
            Event::Reserve(engine, message) => self.on_reserve(engine, message),
            Event::Keep(engine, message) => self.on_keep(engine, message),
            Event::Fetcher { from, message } => self.on_fetcher(from, message),
            Event::Computing(engine, message) => self.on_computing(engine, &message),
            Event::Staged(engine, message) => self.on_staged(engine, &message),
            Event::Cancel(engine, message) => self.on_engine_cancel(engine, &message.req),
            Event::EngineGone(engine) => self.on_engine_gone(engine),
            Event::Linked {
                to,
                epoch: _,
                v: 0,
                slots,
                transport,
                cancels,
            } => self.on_linked(&to, Link::Lmcache(Foreign::new(slots, transport, cancels))),
            Event::Linked {
                to,
                epoch,
                transport,
                ..
            } => self.on_linked(&to, Link::Up { epoch, transport }),
            Event::LinkLost { to, reason } => self.on_link_lost(&to, reason),
            Event::Peer { to, message } => self.on_message(&to, message),
            Event::Lasting { transfer } => self.on_lasting(transfer),
            Event::Done {
                transfer,
                sums,
                began,
            } => self.on_done(transfer, &sums, began),
            Event::Failed { transfer, terminal } => self.on_failed(transfer, terminal),
            Event::Watched { watch, stand } => self.on_watched(watch, stand),
            Event::Deadline => {}
            Event::Drain => self.draining = true,
        }
        self.on_deadlines();
        self.grant_slots();
    }

    /// Returns the next action, in order; `None` if there is none.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Returns the time at which [`Event::Deadline`] is due; `None` if no timer runs.
    pub fn deadline(&self) -> Option<Time> {
        let links = self.links.values().filter_map(|link| match link {
            Link::Making(since) => Some(*since + self.config.link),
            Link::Up { .. } | Link::Lmcache(_) => None,
        });
        self.requests
            .values()
            .filter_map(|r| self.deadline_of(r))
            .chain(links)
            .chain(self.store.deadline())
            .min()
    }

    /// Returns the use of the send buffer.
    pub fn gauges(&self) -> Gauges {
        let (kept, kept_tokens) = self.store.gauges();
        Gauges {
            kept,
            kept_tokens,
            free: self.slots.free(),
            held: self.slots.total() - self.slots.free(),
            requests: u32::try_from(self.requests.len()).unwrap_or(u32::MAX),
            transfers: u32::try_from(self.transfers.len()).unwrap_or(u32::MAX),
        }
    }

    /// Returns the receiver that granted a lease for a request. LMCache's receivers grant no
    /// leases.
    pub fn leased_from(&self, req: &RequestId) -> Option<&Target> {
        let request = self.requests.get(req)?;
        request.lease().map(|_| &request.to)
    }

    /// Returns true if no request is in flight, no KV is kept and every slot is free.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.store.is_empty() && self.slots.free() == self.slots.total()
    }

    fn seq(&mut self) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        seq
    }

    fn send(&mut self, to: &Target, message: ToReceiver) {
        self.actions.push_back(Action::Send {
            to: to.clone(),
            message,
        });
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

impl Sender {
    fn deadline_of(&self, request: &Request) -> Option<Time> {
        match &request.phase {
            // No timer is necessary for a write in flight: the transport has its own timeout.
            Phase::Feeding(feeding) if feeding.over => None,
            Phase::Feeding(feeding) => {
                let stalled = request.progress + self.config.stall;
                let patience = feeding.waits.map(|since| self.lmcache_patience(since));
                Some(patience.map_or(stalled, |p| p.min(stalled)))
            }
            _ => request.deadline(&self.config),
        }
    }
}

impl Request {
    /// Returns the next time at which the sender must act on this request.
    fn deadline(&self, config: &Config) -> Option<Time> {
        let stalled = self.progress + config.stall;
        match &self.phase {
            Phase::Feeding(_) => None,
            Phase::Linking => Some(stalled),
            Phase::Withdrawing(told) => Some(told.sent + config.repeat),
            Phase::Asking { sent, .. } => Some(stalled.min(*sent + config.repeat)),
            Phase::Leased(lease) if self.is_done() => Some(lease.spoke + config.repeat),
            Phase::Leased(lease) => Some(stalled.min(lease.spoke + config.heartbeat)),
            Phase::Closing {
                told: Some(told), ..
            } => Some(told.sent + config.repeat),
            // No timer is necessary for a write in flight: the transport has its own timeout.
            Phase::Closing { lease, .. } => Some(lease.spoke + config.heartbeat),
        }
    }
}
