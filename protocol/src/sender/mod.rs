//! The sending side of the handshake: from the engine's reservation to the receiver's last
//! acknowledgement.
//!
//! The states of a request stand at its `Phase`, those of a chunk at its `Chunk`. The rules:
//!
//! * A send slot goes to a chunk only when the receiver has granted a slot for it *and* the engine is
//!   about to complete it, so a slot never waits for compute that other slots could hold up.
//! * `Written` is said only after the transport reported the flush, and repeated until `Ack`.
//! * A lease that ends early is closed by `CancelNotif` after the last write under way has ended; the
//!   slots of writes whose end nobody knows are named `dirty` in it.
//! * A message about a lease that is not known any more is answered with `CancelNotif`: by our word
//!   nothing is under way under it, but for what the graves name.

mod engine;
mod events;
mod lmcache;
mod on_peer;
mod push;
mod request;
mod teardown;

use std::collections::{BTreeMap, VecDeque};

use crate::local::Target;
use crate::message::ToReceiver;
use crate::slots::Slots;
use crate::{EngineId, Epoch, LeaseId, Reason, RequestId, Time, TransferId};

pub use events::{Action, After, Config, Event, Gauges, Piece, WatchId};
use lmcache::Foreign;
use request::{Phase, Request};
use teardown::PATIENCE;

/// The sending side of one rank. See the module's documentation.
#[derive(Debug)]
pub struct Sender {
    config: Config,
    now: Time,
    slots: Slots,
    requests: BTreeMap<RequestId, Request>,
    links: BTreeMap<Target, Link>,
    transfers: BTreeMap<TransferId, RequestId>,
    /// Dirty slots of leases that are over, for receivers that ask late.
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
    /// The init handshake is under way since then.
    Making(Time),
    /// It is done.
    Up { epoch: Epoch, transport: String },
    /// It is done; LMCache.
    Lmcache(Foreign),
}

/// How many leases with dirty slots are remembered.
const GRAVES: usize = 1024;

impl Sender {
    /// A sender with every slot free.
    pub fn new(config: Config) -> Self {
        Self {
            now: Time::default(),
            slots: Slots::new(config.slots),
            requests: BTreeMap::new(),
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

    /// Takes in one event. Actions wait in [`Self::poll_action`] afterwards.
    pub fn handle(&mut self, now: Time, event: Event) {
        self.now = self.now.max(now);
        match event {
            Event::Reserve(engine, message) => self.on_reserve(engine, message),
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

    /// The next thing to do, in order.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Event::Deadline`] is due at the latest.
    pub fn deadline(&self) -> Option<Time> {
        let links = self.links.values().filter_map(|link| match link {
            Link::Making(since) => Some(*since + self.config.link),
            Link::Up { .. } | Link::Lmcache(_) => None,
        });
        self.requests
            .values()
            .filter_map(|r| self.deadline_of(r))
            .chain(links)
            .min()
    }

    /// What the buffer holds now.
    pub fn gauges(&self) -> Gauges {
        Gauges {
            free: self.slots.free(),
            held: self.slots.total() - self.slots.free(),
            requests: u32::try_from(self.requests.len()).unwrap_or(u32::MAX),
            transfers: u32::try_from(self.transfers.len()).unwrap_or(u32::MAX),
        }
    }

    /// The receiver that has leased room for a request. LMCache's lease nothing.
    pub fn leased_from(&self, req: &RequestId) -> Option<&Target> {
        let request = self.requests.get(req)?;
        request.lease().map(|_| &request.to)
    }

    /// Nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.slots.free() == self.slots.total()
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
            // A write under way ends by itself: the transport bounds it.
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
    /// The next time at which something about this request is due.
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
            // A write under way ends by itself: the transport bounds it.
            Phase::Closing { lease, .. } => Some(lease.spoke + config.heartbeat),
        }
    }
}
