//! Runs the sending role of one rank: the task that owns its machine.
//!
//! Every input is an event. The machine decides, and the task carries out the machine's actions. The task
//! itself keeps no protocol state; it only owns the links and sockets to receivers.

mod connection;
mod fetch_port;
mod peers;
mod ranges;
mod writes;

use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use futures::future::{join, join_all};
use protocol::local::{Granted, Target, ToEngine, ToSidecar};
use protocol::registration::{NotifX, Progress, ProxyNotif, ToProxy};
use protocol::sender::{Action, Event, Gauges, Sender, WatchId};
use protocol::{EngineId, Reason, TransferId, VERSION};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use crate::engine::drain::Drain;
use crate::engine::sessions::{Engines, SlotLayout};
use crate::engine::socket::FromEngine;
use crate::memory::Buffer;
use crate::peer::process_lock::ProcessLock;
use crate::rank::context::{Clock, RankContext, RankRole};
use crate::transport::{Outcome, Readiness};
use connection::ReceiverKind;
pub(crate) use fetch_port::FetchPort;
use fetch_port::next_fetch;
use peers::{FromReceiver, Peers};

/// The task of a rank's sender. The machine decides, and the task carries out its actions.
#[derive(Debug)]
pub(crate) struct SenderTask {
    context: RankContext,
    engines: Engines,
    machine: Option<Sender>,
    peers: Peers,
    /// The port at which decode sides fetch kept KV; `None` if there is no fetch port.
    fetch: Option<FetchPort>,
    /// The machine's counter of changes of its kept KV at the time when the observer last got the kept
    /// requests.
    kept_changes: u64,
    buffer: Arc<Buffer>,
    writes: JoinSet<Wrote>,
    /// The queue of transfers that did not end at once. The wires of these transfers may need the receiver's
    /// help.
    lasting: (mpsc::Sender<TransferId>, mpsc::Receiver<TransferId>),
    watches: JoinSet<(WatchId, Readiness)>,
    clock: Clock,
    draining: bool,
}

/// A write that has ended.
#[derive(Debug)]
struct Wrote {
    to: Target,
    transfer: TransferId,
    outcome: Outcome,
    sums: Vec<u64>,
    bytes: u64,
    /// True if the write had to wait until its bytes were in the send buffer.
    waited: bool,
    /// `ended` minus the time in which the wire was busy with the write's parts. Pauses between the parts do
    /// not count.
    began: Instant,
    ended: Instant,
}

impl SenderTask {
    pub(crate) fn new(
        context: RankContext,
        buffer: Arc<Buffer>,
        process_lock: ProcessLock,
        fetch: Option<FetchPort>,
    ) -> Self {
        let config = &context.config;
        let id = config.rank_id(context.rank);
        let announced = fetch.as_ref().map(|port| port.announced.clone());
        Self {
            engines: Engines::new(id, Arc::clone(&buffer), config, announced),
            fetch,
            kept_changes: 0,
            machine: None,
            peers: Peers::new(
                context.wires.clone(),
                Arc::clone(config),
                context.rank,
                process_lock,
            ),
            buffer,
            writes: JoinSet::new(),
            lasting: mpsc::channel(LASTING),
            watches: JoinSet::new(),
            clock: Clock::start(),
            draining: false,
            context,
        }
    }

    /// Runs until `stop` is cancelled, or, once the drain ends the roles, until no request is in flight and no KV is
    /// kept.
    pub(crate) async fn run(
        mut self,
        mut engines: mpsc::Receiver<FromEngine>,
        drain: Drain,
        stop: CancellationToken,
    ) {
        loop {
            self.publish();
            let unfetched = self.machine.as_ref().map_or(0, Sender::unfetched);
            drain.publish(self.context.rank, self.draining, unfetched);
            if drain.is_ending()
                && self.draining
                && self.machine.as_ref().is_none_or(Sender::is_idle)
            {
                break;
            }
            let deadline = self.machine.as_ref().and_then(Sender::deadline);
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                Some(wrote) = self.writes.join_next() => match wrote {
                    Ok(wrote) => self.on_wrote(wrote),
                    Err(panic) => std::panic::resume_unwind(panic.into_panic()),
                },
                Some(transfer) = self.lasting.1.recv() => self.feed(Event::Lasting { transfer }),
                Some(watched) = self.watches.join_next() => match watched {
                    Ok((watch, standing)) => self.on_watched(watch, standing),
                    Err(panic) => std::panic::resume_unwind(panic.into_panic()),
                },
                Some(event) = self.peers.next() => self.on_receiver(event),
                Some(event) = engines.recv() => self.on_engine(event),
                received = next_fetch(&mut self.fetch) => match received {
                    Ok(event) => self.on_fetch_port(event),
                    Err(error) => {
                        error!(%error, "the fetch port has failed");
                        break;
                    }
                },
                () = self.clock.sleep_until(deadline) => self.feed(Event::Deadline),
                () = drain.begins(), if !self.draining => {
                    self.draining = true;
                    self.feed(Event::Drain);
                }
                () = drain.ends(), if !drain.is_ending() => {}
            }
        }
        if let Some(port) = self.fetch.take() {
            port.server.close().await;
        }
        self.peers.close().await;
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
                        .engine_refused(RankRole::Sender, reason),
                }
            }
            FromEngine::Message(engine, message) => match message {
                ToSidecar::Reserve(m) => {
                    // The receiver may have closed the connection because it was idle, or to make room for
                    // another peer. This check notices the loss before a write fails because of it.
                    if self.peers.is_broken(&m.to) {
                        let (to, reason) = (m.to.clone(), Reason::PeerLost);
                        self.feed(Event::LinkLost { to, reason });
                    }
                    self.feed(Event::Reserve(engine, m));
                }
                ToSidecar::Keep(m) => self.feed(Event::Keep(engine, m)),
                ToSidecar::Computing(m) => self.feed(Event::Computing(engine, m)),
                ToSidecar::Staged(m) => self.feed(Event::Staged(engine, m)),
                ToSidecar::Cancel(m) => self.feed(Event::Cancel(engine, m)),
                other => {
                    warn!(%engine, ?other, "ignored a message that a prefill engine does not send")
                }
            },
            FromEngine::Gone(engine) => {
                self.engines.gone(engine);
                self.feed(Event::EngineGone(engine));
            }
            FromEngine::Malformed => {}
        }
    }

    /// Starts a machine for a new slot layout.
    fn begin(&mut self, slot_layout: &SlotLayout) {
        self.context
            .wires
            .divide(slot_layout.slots, slot_layout.slot_bytes);
        self.peers.begin(slot_layout);
        let config = self.context.config.sender_config(
            self.context.rank,
            slot_layout.epoch,
            slot_layout.slots,
            slot_layout.layout.clone(),
        );
        self.context.trace.begin_sender(&config);
        self.machine = Some(Sender::new(config));
        if self.draining {
            self.feed(Event::Drain);
        }
    }

    fn on_receiver(&mut self, event: FromReceiver) {
        match event {
            FromReceiver::Message(to, message) => {
                debug!(?to, ?message, "from receiver");
                self.feed(Event::Peer { to, message });
            }
            FromReceiver::Linked {
                to,
                epoch,
                slots,
                transport,
                kind,
            } => self.feed(Event::Linked {
                to,
                epoch,
                v: match kind {
                    ReceiverKind::Ours => VERSION,
                    ReceiverKind::Lmcache { .. } => 0,
                },
                slots,
                transport,
                cancels: kind == ReceiverKind::Lmcache { cancels: true },
            }),
            FromReceiver::Malformed => self.context.malformed("alloc"),
            FromReceiver::Lost(to, reason) => {
                self.context.metrics.link_lost(self.context.rank, reason);
                self.feed(Event::LinkLost { to, reason });
            }
        }
    }

    fn on_wrote(&mut self, wrote: Wrote) {
        let transfer = wrote.transfer;
        match wrote.outcome {
            Outcome::Done => {
                self.peers
                    .measured(&wrote.to, wrote.bytes, wrote.began, wrote.ended);
                self.feed(Event::Done {
                    transfer,
                    sums: wrote.sums,
                    began: wrote.waited.then(|| self.clock.at(wrote.began)),
                });
            }
            Outcome::Failed { terminal, error } => {
                let to = format!("{}:{}", wrote.to.host, wrote.to.alloc_port);
                warn!(peer = to, %transfer, terminal, error, "write failed");
                self.feed(Event::Failed { transfer, terminal });
            }
        }
    }

    fn on_watched(&mut self, watch: WatchId, standing: Readiness) {
        if let Readiness::Never(why) = &standing {
            warn!(
                why,
                "chunks for an LMCache receiver will never be ready in their send slots"
            );
        }
        let stand = standing == Readiness::There;
        self.feed(Event::Watched { watch, stand });
    }

    fn feed(&mut self, event: Event) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let now = self.clock.now();
        self.context.trace.sender_event(now, &event);
        machine.handle(now, event);
        while let Some(action) = self.machine.as_mut().and_then(Sender::poll_action) {
            self.context.trace.sender_action(&action);
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Link { to } => self.peers.link(to),
            Action::Send { to, message } => self.peers.send(&to, &message),
            Action::Write {
                to,
                transfer,
                lease,
                pieces,
                after,
                layers,
            } => {
                let bytes = pieces.iter().map(|p| p.bytes).sum();
                // The sums are computed after the write, so they do not delay it.
                let sums = self.sums(&pieces);
                let waited = after.is_some();
                // Each part waits for the event of its own layers. The end of the last part is the end of the
                // write.
                let mut parts = self.parts(&to, pieces, after, &layers);
                let last = parts.pop();
                let (early, mut spans): (Vec<_>, Vec<_>) = parts
                    .into_iter()
                    .map(|(pieces, after)| self.write(&to, lease, pieces, after))
                    .unzip();
                let (pieces, after) = last.unwrap_or_default();
                let (write, times) = self.write(&to, lease, pieces, after);
                let lasting = self.lasting.0.clone();
                self.writes.spawn(async move {
                    let posted = Instant::now();
                    let mut whole = pin!(join(join_all(early), write));
                    let (early, outcome) = tokio::select! {
                        biased;
                        ended = &mut whole => ended,
                        // The receiver already knows about a write that waits for its bytes. The sender asks
                        // the receiver for help only with other writes.
                        () = times.lasting(), if !waited => {
                            if lasting.try_send(transfer).is_err() {
                                debug!(%transfer, "cannot ask the receiver for help with a write: the queue is full");
                            }
                            whole.await
                        }
                    };
                    // The write counts as done only if every part is done.
                    let outcome = early.into_iter().fold(outcome, Outcome::and);
                    let ended = times.ended().unwrap_or_else(Instant::now);
                    spans.push(times);
                    let spans = spans.iter().map(|times| {
                        let (began, until) = (times.began(), times.ended());
                        (began.unwrap_or(posted), until.unwrap_or(ended))
                    });
                    // Pauses between the parts are the engine's time and must not lower the measured rate of
                    // the wire.
                    let began = ended.checked_sub(ranges::busy(spans)).unwrap_or(posted);
                    let sums = match outcome {
                        Outcome::Done => sums(),
                        Outcome::Failed { .. } => Vec::new(),
                    };
                    Wrote {
                        to,
                        transfer,
                        outcome,
                        sums,
                        bytes,
                        waited,
                        began,
                        ended,
                    }
                });
            }
            Action::Watch { watch, after } => {
                let ready = self.ready(Some(after));
                let stall = self.context.config.times.stall;
                self.watches.spawn(async move {
                    let standing = match ready {
                        Ok(ready) => ready.stands(stall).await,
                        Err(unknown) => Readiness::Never(format!("{unknown:?}")),
                    };
                    (watch, standing)
                });
            }
            Action::Granted(engine, m) => {
                let layers = self.gains_by_layers(&m);
                self.tell(engine, ToEngine::Granted(Granted { layers, ..m }));
            }
            Action::Ended(engine, m) => self.tell(engine, ToEngine::Ended(m)),
            Action::Progress(req_id) => {
                self.context
                    .observer
                    .tell_proxy(&ToProxy::Progress(Progress {
                        id: self.context.config.id.clone(),
                        req_id,
                    }))
            }
            Action::Notify {
                req,
                reason,
                bytes,
                us,
                transport,
            } => self
                .context
                .observer
                .tell_proxy(&ToProxy::ProxyNotif(ProxyNotif {
                    req_id: req,
                    x: Some(NotifX {
                        v: VERSION,
                        ok: reason.is_none(),
                        reason,
                        bytes,
                        us,
                        transport,
                    }),
                })),
            Action::Answer { to, message } => self.answer_fetcher(to, &message),
            Action::Record(record) => self.context.record(RankRole::Sender, &record),
        }
    }

    fn tell(&self, engine: EngineId, message: ToEngine) {
        self.engines.send(engine, message);
    }

    fn publish(&mut self) {
        self.publish_kept();
        let gauges = self.machine.as_ref().map(Sender::gauges);
        let Gauges {
            free,
            held,
            requests,
            kept,
            kept_tokens,
            ..
        } = gauges.unwrap_or_default();
        self.context.publish(
            RankRole::Sender,
            crate::rank::context::Gauges {
                slot_layout: self.engines.slot_layout(),
                engines: self.engines.connected(),
                unmoved: self.engines.unmoved(),
                free,
                held,
                quarantined: 0,
                parked_tokens: 0,
                requests,
                kept,
                kept_tokens,
                expected: 0,
            },
            self.peers.links(),
        );
    }
}

/// Maximum number of transfers that wait for their event `Lasting`; a wire has far fewer in flight.
const LASTING: usize = 1024;
