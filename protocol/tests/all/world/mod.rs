//! Simulation of a sender and a receiver with their engines, transports and clock.
//!
//! Control messages are lost, delayed, reordered and duplicated. Writes land in any order, land
//! late or never land. Connections break; either sidecar and either engine dies. The plan's seed
//! determines everything, so a plan that fails once fails again.
//!
//! The simulation checks while it runs:
//! * When the engine reads a landing slot, the slot contains exactly the chunk's content: the parts of
//!   all groups of layers at their places. No write changes the slot before the engine releases the
//!   slot.
//! * A request that ends well has delivered every token that each group needs, and every byte of each
//!   state. A write has exactly the size of its parts.
//! * A write lands only in a slot that is open or quarantined under the write's lease.
//! * A write carries the chunk that the engine staged, not the chunk that a later request put into
//!   the same send slot.
//! * Each reservation and each parked request ends exactly once, within its deadline.
//!
//! At the end it checks that no request is in flight and every slot is free.

mod engines;
mod kept;
mod model;
mod net;
mod plan;
mod script;
mod stranger;
mod wire;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use protocol::plan::Chunking;
use protocol::receiver::{self, Receiver};
use protocol::sender::{self, Sender};
use protocol::{EngineId, Epoch, Layout, LeaseId, Time};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::setup::{self, target};
use engines::{DecodeEngine, PrefillEngine};
pub(crate) use kept::keeper;
pub(crate) use model::Model;
use net::Net;
pub(crate) use plan::{Fault, NetPlan, Park, Plan, RequestPlan, plan, plans};
pub(crate) use wire::Attack;
use wire::Wire;

const MS: u64 = 1000;
const SECOND: u64 = 1000 * MS;

/// Result of a plan.
#[derive(Default)]
pub(crate) struct Outcome {
    /// Number of parked requests that got all their KV.
    pub(crate) delivered: usize,
    /// Reasons of the parked requests that ended without all their KV.
    pub(crate) failed: Vec<protocol::Reason>,
    /// Number of reservations that succeeded.
    pub(crate) pushed: usize,
    /// Maximum number of slots that were quarantined at the same time.
    pub(crate) quarantined: u32,
    /// Number of pieces that belong to writes with an unknown end.
    pub(crate) lost_pieces: u32,
    log: Vec<String>,
}

impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "delivered {}, pushed {}, quarantined {}, failed {:?}",
            self.delivered, self.pushed, self.quarantined, self.failed
        )?;
        f.write_str(&self.log.join("\n"))
    }
}

/// Runs a plan to its end and makes all checks. With `WORLD_LOG=1`, a failure shows the events
/// before it.
pub(crate) fn run(plan: &Plan) -> Outcome {
    let mut world = World::new(plan);
    world.script(plan);
    world.settle("the plan");
    world.heal();
    world.settle("the last request");
    world.finish()
}

pub(crate) struct World {
    now: u64,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Happening>>,
    order: u64,
    rng: StdRng,
    layout: Layout,
    chunking: Chunking,
    p: Sender,
    d: Receiver,
    p_epoch: u64,
    d_epoch: u64,
    p_slots: u32,
    d_slots: u32,
    net: Net,
    wire: Wire,
    prefill: PrefillEngine,
    decode: DecodeEngine,
    legs: kept::Legs,
    outcome: Outcome,
    /// True if the sender and the stranger prove keys. The stranger is then a hostile member of the roster.
    keyed: bool,
    /// The lease of the sender's last message. The hostile member knows it.
    overheard: Option<LeaseId>,
    log: Option<Vec<String>>,
}

/// Event of the queue.
#[derive(Debug)]
enum Happening {
    ToSender(sender::Event, u64),
    ToReceiver(receiver::Event, u64),
    FromReceiver(u64, protocol::message::ToSender),
    FromSender(u64, protocol::message::ToReceiver),
    /// A message to the fetch port. The sender that listens there when the message arrives gets it.
    ToKeeper(sender::Event),
    LinkMade(u64),
    Land(wire::Landing),
    WriteLasts(protocol::TransferId, u64),
    WriteEnds(protocol::TransferId, u64, wire::End),
    Prefill(engines::Step),
    Decode(engines::Turn),
    Again(RequestPlan),
    Fault(Fault),
    Prove(u64, protocol::LeaseId),
}

impl World {
    fn new(plan: &Plan) -> Self {
        let layout = plan.model.layout();
        let (p, d) = (
            new_sender(1, plan.send_slots, &layout),
            new_receiver(1001, plan.land_slots, &layout),
        );
        Self {
            now: 1,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            order: 0,
            rng: StdRng::seed_from_u64(plan.seed),
            chunking: Chunking::of(&layout),
            layout,
            p,
            d,
            p_epoch: 1,
            d_epoch: 1001,
            p_slots: plan.send_slots,
            d_slots: plan.land_slots,
            net: Net::new(plan.net.clone()),
            wire: Wire::new(plan),
            prefill: PrefillEngine::new(EngineId(1)),
            decode: DecodeEngine::new(EngineId(2)),
            legs: kept::Legs::default(),
            outcome: Outcome::default(),
            keyed: plan.seed % 2 == 1,
            overheard: None,
            log: std::env::var_os("WORLD_LOG").map(|_| Vec::new()),
        }
    }

    fn at(&mut self, time: u64, what: Happening) {
        self.order += 1;
        self.queue
            .push(Reverse((time.max(self.now), self.order, self.events.len())));
        self.events.push(Some(what));
    }

    fn after(&mut self, delay: u64, what: Happening) {
        self.at(self.now + delay, what);
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(log) = &mut self.log {
            log.push(format!("{:>10} {}", self.now, text()));
        }
    }

    /// Fails the test and shows the events so far.
    fn fail(&self, why: &str) -> ! {
        let log = self.log.clone().unwrap_or_default().join("\n");
        panic!("{why}\n{log}\n{:?}\n{:?}", self.p, self.d);
    }

    /// Runs until no event and no deadline is left.
    fn settle(&mut self, what: &str) {
        let end = self.now + 600 * SECOND;
        let mut steps = 0;
        loop {
            self.drain_actions();
            let due = self.queue.peek().map(|Reverse((time, ..))| *time);
            let deadlines = [self.p.deadline(), self.d.deadline()];
            let [p, d] = deadlines.map(|t| t.map(|t| t.0));
            let Some(next) = due.into_iter().chain(p).chain(d).min() else {
                return;
            };
            steps += 1;
            if next > end || steps > 200_000 {
                self.fail(&format!("{what} does not come to rest"));
            }
            self.now = self.now.max(next);
            if due == Some(next) {
                let Some(Reverse((.., index))) = self.queue.pop() else {
                    return;
                };
                if let Some(event) = self.events[index].take() {
                    self.note(|| format!("{event:?}"));
                    self.happen(event);
                }
            } else if p == Some(next) {
                self.p.handle(Time(self.now), sender::Event::Deadline);
            } else {
                self.d.handle(Time(self.now), receiver::Event::Deadline);
            }
            self.check_gauges();
        }
    }

    fn happen(&mut self, event: Happening) {
        match event {
            Happening::ToSender(event, epoch) if epoch == self.p_epoch => {
                self.p.handle(Time(self.now), event);
            }
            Happening::ToReceiver(event, epoch) if epoch == self.d_epoch => {
                if let receiver::Event::Peer { route, .. } = &event {
                    self.connects(*route, "stranger");
                }
                self.d.handle(Time(self.now), event);
            }
            Happening::ToKeeper(event) => self.p.handle(Time(self.now), event),
            Happening::ToSender(..) | Happening::ToReceiver(..) => {}
            Happening::FromSender(route, message) => self.deliver_to_receiver(route, message),
            Happening::FromReceiver(route, message) => self.deliver_to_sender(route, message),
            Happening::LinkMade(epoch) => self.link_made(epoch),
            Happening::Land(landing) => self.land(&landing),
            Happening::WriteLasts(transfer, epoch) => self.write_lasts(transfer, epoch),
            Happening::WriteEnds(transfer, epoch, end) => self.write_ends(transfer, epoch, end),
            Happening::Prefill(step) => self.prefill_step(step),
            Happening::Decode(turn) => self.decode_turn(turn),
            Happening::Again(plan) => self.again(&plan),
            Happening::Fault(fault) => self.strike(fault),
            Happening::Prove(epoch, lease) => self.prove(epoch, lease),
        }
    }

    fn drain_actions(&mut self) {
        loop {
            if let Some(action) = self.p.poll_action() {
                self.note(|| format!("P {action:?}"));
                self.sender_action(action);
            } else if let Some(action) = self.d.poll_action() {
                self.note(|| format!("D {action:?}"));
                self.receiver_action(action);
            } else {
                return;
            }
        }
    }

    fn sender_action(&mut self, action: sender::Action) {
        match action {
            sender::Action::Link { to } if to != target() => {
                self.fail("a stranger made the sender connect to its address");
            }
            sender::Action::Link { .. } => self.make_link(),
            sender::Action::Send { message, .. } => self.send_to_receiver(&message),
            sender::Action::Write {
                transfer,
                lease,
                pieces,
                ..
            } => self.post_write(transfer, lease, &pieces),
            // The simulation has no LMCache peer. The tests with LMCache's receivers are in
            // lmcache_receivers.rs.
            sender::Action::Watch { .. } => self.fail("a watch for nobody"),
            sender::Action::Granted(engine, granted) => self.prefill_granted(engine, granted),
            sender::Action::Ended(engine, ended) => self.prefill_ended(engine, &ended),
            sender::Action::Progress(req) => self.proxy_hears(&req, true),
            sender::Action::Notify { req, .. } => self.proxy_hears(&req, false),
            sender::Action::Answer { to, message } => self.keeper_answers(to, &message),
            sender::Action::Record(_) => {}
        }
    }

    fn receiver_action(&mut self, action: receiver::Action) {
        match action {
            receiver::Action::Send { route, message } if route == stranger::ROUTE => {
                self.stranger_hears(&message);
            }
            receiver::Action::Send { route, message } => self.send_to_sender(route, &message),
            receiver::Action::Ready(engine, ready) => self.decode_ready(engine, &ready),
            receiver::Action::Ended(engine, ended) => self.decode_ended(engine, &ended),
            receiver::Action::Open { lease, slot } => self.open_slot(lease, slot),
            receiver::Action::Close { slot } => self.close_slot(slot),
            receiver::Action::Fence { sender, lease, .. } => self.fence(&sender, lease),
            // The simulation has no LMCache peer. The tests with LMCache's senders are in
            // lmcache_senders.rs.
            receiver::Action::Mark { .. } | receiver::Action::CheckCanary { .. } => {
                self.fail("slots lent to nobody");
            }
            receiver::Action::Ask { message, .. } => self.ask_keeper(&message),
            receiver::Action::Record(_) => {}
        }
    }

    fn check_gauges(&mut self) {
        let p = self.p.gauges();
        let d = self.d.gauges();
        if p.free + p.held != self.p_slots {
            self.fail("send slots are lost");
        }
        if d.free + d.held + d.quarantined != self.d_slots {
            self.fail(&format!("landing slots are lost: {d:?}"));
        }
        self.outcome.quarantined = self.outcome.quarantined.max(d.quarantined);
    }

    /// Ends all faults and starts one more request. Through the messages of this request both sides
    /// notice earlier losses.
    fn heal(&mut self) {
        self.net.plan = NetPlan::default();
        self.net.partitioned_until = 0;
        self.wire.fail_next.clear();
        self.wire.attack = None;
        self.net.corrupt_next = false;
        self.script_request(&RequestPlan::simple("last", 5), self.now);
    }

    fn finish(mut self) -> Outcome {
        if let Some(wrong) = self.prefill.unended().or_else(|| self.decode.unended()) {
            self.fail(&wrong);
        }
        self.outcome.log = self.log.clone().unwrap_or_default();
        if self.p.gauges().held > 0 || self.p.gauges().requests > 0 || self.p.gauges().kept > 0 {
            self.fail("the sender is not idle");
        }
        let d = self.d.gauges();
        if d.held > 0 || d.requests > 0 || d.expected > 0 {
            self.fail("the receiver is not idle");
        }
        // Slots may stay quarantined only because of writes with an unknown end, and only until the
        // sender's process has ended. The exception is a draining side: it accepts no new request,
        // so the two sides exchange no further messages.
        if d.quarantined > 0 && self.outcome.lost_pieces == 0 && !self.net.draining {
            self.fail("slots stay quarantined although every write ended");
        }
        self.strike(Fault::KillSender);
        self.settle("the sender's death");
        if !self.d.is_idle() || !self.p.is_idle() {
            self.fail("slots are held at the end");
        }
        self.outcome.delivered = self.decode.delivered;
        self.outcome.failed = self.decode.failed.clone();
        self.outcome.pushed = self.prefill.pushed;
        self.outcome
    }

    fn jitter(&mut self, low: u64, high: u64) -> u64 {
        self.rng.random_range(low..=high)
    }
}

fn new_sender(epoch: u64, slots: u32, layout: &Layout) -> Sender {
    Sender::new(sender::Config {
        epoch: Epoch(epoch),
        max_requests: 64,
        layout: layout.clone(),
        ..setup::sender(slots)
    })
}

fn new_receiver(epoch: u64, slots: u32, layout: &Layout) -> Receiver {
    Receiver::new(receiver::Config {
        epoch: Epoch(epoch),
        max_requests: 64,
        lmcache_wait: setup::SECOND / 2,
        seed: epoch,
        ..setup::receiver_of(layout.clone(), slots)
    })
}
