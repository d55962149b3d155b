//! Runs the receiving role of one rank: the task that owns its machine, its ports and its buffer.

mod checks;
mod keepers;
mod lmcache;
mod ports;
mod write_fence;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::identity::Role as Part;
use common::zmq::{FromPeer, Protection, RouterServer};
use protocol::local::{Target, ToEngine, ToSidecar};
use protocol::message::{Hello, Pages, Refusal};
use protocol::receiver::{Action, Event, Receiver};
use protocol::{EngineId, Epoch, LeaseId, Reason, SlotIndex, VERSION, codec};
use serde_bytes::ByteBuf;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::engine::drain::Drain;
use crate::engine::sessions::{Engines, SlotLayout};
use crate::engine::socket::FromEngine;
use crate::memory::Buffer;
use crate::net::host_id;
use crate::peer::handshake::Identity;
use crate::rank::context::{Clock, Gauges, RankContext, RankRole};
use checks::Checks;
use keepers::{FromKeeper, Keepers};
use lmcache::canary::Canaries;
use lmcache::peers::LmcachePeers;
use lmcache::pending::PendingBeforeEngine;
use ports::next_query;
use write_fence::{News, WriteFences};

/// The task of a rank's receiver. The machine decides, and the task carries out its actions.
#[derive(Debug)]
pub(crate) struct ReceiverTask {
    context: RankContext,
    engines: Engines,
    machine: Option<Receiver>,
    buffer: Arc<Buffer>,
    init: RouterServer,
    alloc: RouterServer,
    /// The query port, which only LMCache's bidirectional mode uses; `None` without it.
    query: Option<RouterServer>,
    /// The address of this rank, at which senders find it.
    target: Target,
    keepers: Keepers,
    identity: Identity,
    pending: PendingBeforeEngine,
    lmcache_peers: LmcachePeers,
    canaries: Canaries,
    checks: Checks,
    fences: WriteFences,
    clock: Clock,
    draining: bool,
}

impl ReceiverTask {
    pub(crate) fn new(
        context: RankContext,
        buffer: Arc<Buffer>,
        init: RouterServer,
        alloc: RouterServer,
        query: Option<RouterServer>,
        target: Target,
    ) -> Self {
        let config = &context.config;
        let id = config.rank_id(context.rank);
        // Before an engine comes, the hello has no layout and epoch 0; `begin` fills in both.
        let hello = Hello {
            v: VERSION,
            id: id.clone(),
            epoch: Epoch(0),
            layout: None,
            transports: context.wires.adverts(),
            host: host_id::identity(),
            pid: std::process::id(),
            seal: ByteBuf::new(),
            ended: Vec::new(),
            refused: None,
        };
        Self {
            keepers: Keepers::new(
                id.clone(),
                config.times.link,
                Protection::of(config.identity.as_ref(), &[Part::Sender]),
            ),
            target,
            engines: Engines::new(id, Arc::clone(&buffer), config, None),
            machine: None,
            buffer,
            init,
            alloc,
            query,
            identity: Identity {
                hello,
                metadata: context.wires.handshake_fields().metadata,
                rows: Vec::new(),
                memory: context.wires.memory(),
                pages: Pages {
                    v: VERSION,
                    slots: 0,
                    slot_bytes: 0,
                },
            },
            pending: PendingBeforeEngine::default(),
            lmcache_peers: LmcachePeers::default(),
            canaries: Canaries::default(),
            checks: Checks::default(),
            fences: WriteFences::new(config.times.fence),
            clock: Clock::start(),
            draining: false,
            context,
        }
    }

    /// Runs until `stop` is cancelled, or, once the drain ends the roles, until no request is in flight.
    pub(crate) async fn run(
        mut self,
        mut engines: mpsc::Receiver<FromEngine>,
        drain: Drain,
        stop: CancellationToken,
    ) {
        loop {
            // The state is published before each wait, so that metrics show the result of the last event.
            self.publish();
            if self.draining && self.machine.as_ref().is_none_or(Receiver::is_idle) {
                break;
            }
            let deadline = self.machine.as_ref().and_then(Receiver::deadline);
            // The branches are in the order of their priority. The alloc port comes first, because senders wait
            // for its answers.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                received = self.alloc.recv() => match received {
                    Ok(event) => self.on_alloc_port(event),
                    Err(error) => {
                        error!(%error, "the alloc port has failed");
                        break;
                    }
                },
                Some(event) = engines.recv() => self.on_engine(event),
                received = self.init.recv() => match received {
                    Ok(FromPeer::Message(route, bytes)) => self.on_init(route, &bytes),
                    Ok(FromPeer::Lost(route)) => {
                        self.pending.lost_init(route);
                        self.lmcache_peers.lost_init(route);
                    }
                    Err(error) => {
                        error!(%error, "the init port has failed");
                        break;
                    }
                },
                received = next_query(&mut self.query) => match received {
                    Ok(FromPeer::Message(route, bytes)) => self.on_query(route, &bytes),
                    Ok(FromPeer::Lost(_)) => {}
                    Err(error) => {
                        error!(%error, "the query port has failed");
                        break;
                    }
                },
                event = self.keepers.next() => self.on_fetch_port(event),
                news = self.fences.next() => match news {
                    News::Settling => self.expect(),
                    News::Over(sender) => self.feed(Event::Fenced { sender, lease: None }),
                },
                checked = self.checks.next() => self.on_checked(checked),
                () = self.clock.sleep_until(deadline) => self.feed(Event::Deadline),
                () = drain.ends(), if !self.draining => {
                    self.draining = true;
                    self.feed(Event::Drain);
                }
            }
        }
        // Closing the sockets shows the peers at once that this receiver has ended.
        self.keepers.close().await;
        self.init.close().await;
        self.alloc.close().await;
        if let Some(query) = self.query {
            query.close().await;
        }
    }

    fn on_engine(&mut self, event: FromEngine) {
        match event {
            FromEngine::Hello(connection, hello) => {
                let busy = self.machine.as_ref().is_some_and(|m| !m.is_idle());
                match self.engines.hello(connection, &hello, busy) {
                    Ok(Some(slot_layout)) => self.begin(&slot_layout),
                    Ok(None) => {}
                    Err(reason) => self
                        .context
                        .metrics
                        .engine_refused(RankRole::Receiver, reason),
                }
                self.refuse_senders();
            }
            FromEngine::Message(engine, message) => match message {
                ToSidecar::Expect(m) => self.feed(Event::Expect(engine, m)),
                ToSidecar::Await(m) => self.feed(Event::Await(engine, m)),
                ToSidecar::Release(m) => self.feed(Event::Release(engine, m)),
                ToSidecar::Abort(m) => self.feed(Event::Abort(engine, m)),
                other => {
                    warn!(%engine, ?other, "ignored a message that a decode engine does not send")
                }
            },
            FromEngine::Gone(engine) => {
                self.engines.gone(engine);
                self.refuse_senders();
                self.feed(Event::EngineGone(engine));
            }
            FromEngine::Malformed => {}
        }
    }

    /// Puts a refusal into the hello if the engine moves no KV. Senders read the reason at their next
    /// handshake.
    fn refuse_senders(&mut self) {
        self.identity.hello.refused = self.engines.unmoved().map(|why| Refusal {
            reason: Reason::LayoutMismatch,
            text: format!(
                "the engine of {} moves no KV: {why}",
                self.identity.hello.id
            ),
        });
    }

    /// Starts a machine for a new slot layout.
    fn begin(&mut self, slot_layout: &SlotLayout) {
        // The wires get the new layout first, because they provide the slots' addresses for the handshake.
        self.context
            .wires
            .divide(slot_layout.slots, slot_layout.slot_bytes);
        let config = self.context.config.receiver_config(
            slot_layout.epoch,
            slot_layout.slots,
            &slot_layout.layout,
            Some(self.target.clone()),
        );
        let Some(config) = config else {
            error!(
                ?slot_layout,
                "bug: the sidecar took an engine with a layout without a size"
            );
            return;
        };
        let fields = self.context.wires.handshake_fields();
        self.identity = Identity {
            hello: Hello {
                epoch: slot_layout.epoch,
                layout: Some(slot_layout.layout.clone()),
                transports: self.context.wires.adverts(),
                ..self.identity.hello.clone()
            },
            metadata: fields.metadata,
            rows: fields.rows,
            memory: self.context.wires.memory(),
            pages: Pages {
                v: VERSION,
                slots: slot_layout.slots,
                slot_bytes: slot_layout.slot_bytes,
            },
        };
        // LMCache's senders know addresses of the former slot layout, which are wrong now.
        self.lmcache_peers.forget();
        self.canaries = Canaries::default();
        // Peers of LMCache that asked before the engine came get their answers now.
        for (route, request) in self.pending.introductions() {
            self.on_init(route, &request);
        }
        self.context.trace.begin_receiver(&config);
        self.machine = Some(Receiver::new(config));
        for (route, message) in self.pending.asks() {
            self.on_message(route, message);
        }
    }

    fn feed(&mut self, event: Event) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let now = self.clock.now();
        // The trace gets the event before the machine does, so that a crash in the machine can be replayed.
        self.context.trace.receiver_event(now, &event);
        machine.handle(now, event);
        let mut fenced = BTreeMap::new();
        let mut looks = Vec::new();
        while let Some(action) = self.machine.as_mut().and_then(Receiver::poll_action) {
            self.context.trace.receiver_action(&action);
            match action {
                Action::CheckCanary { slots } => looks.extend(slots),
                action => self.act(action, &mut fenced),
            }
        }
        self.expect();
        // A fence or a canary check gives the machine a new event, which must wait until all actions of this
        // event are done.
        for (lease, sender) in fenced {
            self.feed(Event::Fenced {
                sender,
                lease: Some(lease),
            });
        }
        if !looks.is_empty() {
            self.look(looks);
        }
    }

    /// Tells the wires whether they must help writes to arrive. The wires must help while writes are announced,
    /// and while the last writes of a dead sender may still be in a socket.
    fn expect(&self) {
        let writing = self.machine.as_ref().map_or(0, |m| m.gauges().writing);
        let expect = writing > 0 || self.fences.is_settling();
        self.context.wires.expect(expect);
    }

    /// Checks whether each slot's canary was overwritten. The machine may request one re-check per slot.
    fn look(&mut self, slots: Vec<SlotIndex>) {
        let bytes = self
            .engines
            .slot_layout()
            .map_or(0, |slot_layout| slot_layout.slot_bytes);
        let is_gone = |slot: &SlotIndex| self.canaries.gone(&self.buffer, *slot, bytes);
        let (gone, there) = slots.into_iter().partition(is_gone);
        self.feed(Event::CanaryChecked { gone, there });
    }

    fn on_fetch_port(&mut self, event: FromKeeper) {
        match event {
            FromKeeper::Message(from, message) => self.feed(Event::Keeper { from, message }),
            FromKeeper::Lost(from, reason) => self.feed(Event::KeeperLost { from, reason }),
            FromKeeper::Malformed => self.context.malformed("fetch"),
        }
    }

    fn act(
        &mut self,
        action: Action,
        fenced: &mut BTreeMap<LeaseId, protocol::receiver::SenderId>,
    ) {
        match action {
            Action::Send { route, message } => {
                if let Err(error) = self.alloc.send(route, codec::encode(&message)) {
                    debug!(peer = self.alloc.name(route), %error, "answer not sent");
                }
            }
            Action::Ask { to, message } => self.keepers.send(&to, &message),
            Action::Ready(engine, m) => self.tell(engine, ToEngine::Ready(m)),
            Action::Ended(engine, m) => self.tell(engine, ToEngine::Ended(m)),
            Action::Open { lease, slot } => {
                let owner = self.machine.as_ref().and_then(|m| m.principal_of(lease));
                let owner = owner.map(|principal| Arc::from(&*principal.0));
                self.context.wires.open(lease, owner.as_ref(), slot);
            }
            Action::Close { slot } => self.context.wires.close(slot),
            Action::Fence {
                sender,
                lease,
                transport,
            } => {
                // The slots were closed before this action. If this process itself writes the received bytes
                // into its slots, a closed slot is the proof that no write can arrive.
                if self.context.wires.close_is_a_fence(&transport) {
                    fenced.insert(lease, sender);
                } else {
                    self.fences.seek(sender, lease);
                }
            }
            Action::Mark { slot } => self.mark(slot),
            // `feed` collects these actions.
            Action::CheckCanary { .. } => {}
            Action::Record(record) => self.context.record(RankRole::Receiver, &record),
        }
    }

    fn mark(&mut self, slot: SlotIndex) {
        let bytes = self
            .engines
            .slot_layout()
            .map_or(0, |slot_layout| slot_layout.slot_bytes);
        if let Err(error) = self.canaries.put(&self.buffer, slot, bytes) {
            error!(%slot, %error, "cannot write the canary into a slot: the slot will count as not written");
        }
    }

    fn tell(&self, engine: EngineId, message: ToEngine) {
        self.engines.send(engine, message);
    }

    fn publish(&self) {
        let gauges = self.machine.as_ref().map(Receiver::gauges);
        let gauges = gauges.unwrap_or_default();
        self.context.publish(
            RankRole::Receiver,
            Gauges {
                slot_layout: self.engines.slot_layout(),
                engines: self.engines.connected(),
                unmoved: self.engines.unmoved(),
                free: gauges.free,
                held: gauges.held,
                quarantined: gauges.quarantined,
                parked_tokens: gauges.parked_tokens,
                requests: gauges.requests,
                kept: 0,
                kept_tokens: 0,
                expected: gauges.expected,
            },
            std::iter::empty(),
        );
    }
}
