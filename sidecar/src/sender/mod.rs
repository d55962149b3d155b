//! The sending side of one rank: the task that owns its machine.
//!
//! Everything arrives as an event, the machine decides, and its actions are carried out here. The
//! task keeps no protocol state of its own: links and sockets to receivers are resources.

mod peers;

use std::sync::Arc;
use std::time::Instant;

use protocol::local::{Target, ToEngine, ToSidecar};
use protocol::registration::{NotifX, Progress, ProxyNotif, ToProxy};
use protocol::sender::{Action, Event, Gauges, Sender};
use protocol::{EngineId, TransferId, VERSION};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::engines::{Cut, Engines};
use crate::local::FromEngine;
use crate::memory::Buffer;
use crate::side::{Clock, Linger, Side, SideContext};
use crate::transport::Outcome;
use peers::{FromReceiver, Peers};

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct SendSide {
    context: SideContext,
    engines: Engines,
    machine: Option<Sender>,
    peers: Peers,
    buffer: Arc<Buffer>,
    writes: JoinSet<Wrote>,
    clock: Clock,
    linger: Linger,
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
    began: Instant,
    ended: Instant,
}

impl SendSide {
    pub(crate) fn new(context: SideContext, buffer: Arc<Buffer>) -> Self {
        let config = &context.config;
        let id = config.rank_id(context.rank);
        Self {
            engines: Engines::new(id, Arc::clone(&buffer), config.chunk_tokens),
            machine: None,
            peers: Peers::new(context.wires.clone(), Arc::clone(config), context.rank),
            buffer,
            writes: JoinSet::new(),
            clock: Clock::start(),
            linger: Linger::default(),
            draining: false,
            context,
        }
    }

    /// Runs until `stop` is cancelled, or until nothing is under way once `drain` is.
    pub(crate) async fn run(
        mut self,
        mut engines: mpsc::Receiver<FromEngine>,
        drain: CancellationToken,
        stop: CancellationToken,
    ) {
        loop {
            self.publish();
            if self.draining && self.machine.as_ref().is_none_or(Sender::is_idle) {
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
                Some(event) = self.peers.next() => self.on_receiver(event),
                Some(event) = engines.recv() => self.on_engine(event),
                () = self.clock.sleep_until(deadline) => self.feed(Event::Deadline),
                () = self.linger.pass(), if !self.linger.is_over() => {
                    self.linger = Linger::default();
                }
                () = drain.cancelled(), if !self.draining => {
                    self.draining = true;
                    self.feed(Event::Drain);
                }
            }
        }
        self.peers.close().await;
    }

    fn on_engine(&mut self, event: FromEngine) {
        match event {
            FromEngine::Hello(connection, hello) => {
                let busy = self.machine.as_ref().is_some_and(|m| !m.is_idle());
                if let Some(cut) = self.engines.hello(connection, &hello, busy) {
                    self.begin(&cut);
                }
            }
            FromEngine::Message(engine, message) => match message {
                ToSidecar::Reserve(m) => self.feed(Event::Reserve(engine, m)),
                ToSidecar::Computing(m) => self.feed(Event::Computing(engine, m)),
                ToSidecar::Staged(m) => self.feed(Event::Staged(engine, m)),
                ToSidecar::Cancel(m) => self.feed(Event::Cancel(engine, m)),
                other => warn!(%engine, ?other, "not a message of a prefill engine: ignored"),
            },
            FromEngine::Gone(engine) => {
                self.engines.gone(engine);
                self.feed(Event::EngineGone(engine));
            }
            FromEngine::Malformed => {}
        }
    }

    /// A machine for a freshly cut buffer.
    fn begin(&mut self, cut: &Cut) {
        self.context.wires.cut(cut.slots, cut.slot_bytes);
        self.peers.begin(cut);
        let config = self.context.config.sender_config(
            self.context.rank,
            cut.epoch,
            cut.slots,
            cut.layout.clone(),
        );
        self.context.trace.begin_sender(&config);
        self.machine = Some(Sender::new(config));
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
            } => self.feed(Event::Linked {
                to,
                epoch,
                v: VERSION,
                slots,
                transport,
            }),
            FromReceiver::Lost(to, reason) => self.feed(Event::LinkLost { to, reason }),
        }
    }

    fn on_wrote(&mut self, wrote: Wrote) {
        let transfer = wrote.transfer;
        match wrote.outcome {
            Outcome::Done => {
                let took = wrote.ended - wrote.began;
                self.peers.measured(&wrote.to, wrote.bytes, took);
                self.feed(Event::Done {
                    transfer,
                    sums: wrote.sums,
                });
            }
            Outcome::Failed { terminal, error } => {
                let to = format!("{}:{}", wrote.to.host, wrote.to.alloc_port);
                warn!(peer = to, %transfer, terminal, error, "write failed");
                self.feed(Event::Failed { transfer, terminal });
            }
        }
    }

    fn feed(&mut self, event: Event) {
        let Some(machine) = &mut self.machine else {
            return;
        };
        let now = self.clock.now();
        self.context.trace.sender_event(now, &event);
        let message = !matches!(event, Event::Deadline);
        machine.handle(now, event);
        if message {
            self.linger.moved(machine.is_idle());
        }
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
            } => {
                let bytes = pieces.iter().map(|p| p.bytes).sum();
                let sums = self.sums(&pieces);
                let write = self.peers.write(&to, lease, pieces);
                self.writes.spawn(async move {
                    let began = Instant::now();
                    let outcome = write.await;
                    Wrote {
                        to,
                        transfer,
                        outcome,
                        sums,
                        bytes,
                        began,
                        ended: Instant::now(),
                    }
                });
            }
            Action::Granted(engine, m) => self.tell(engine, ToEngine::Granted(m)),
            Action::Ended(engine, m) => self.tell(engine, ToEngine::Ended(m)),
            Action::Progress(req_id) => {
                self.context.shown.tell_proxy(&ToProxy::Progress(Progress {
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
                .shown
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
            Action::Record(record) => self.context.record(Side::Sender, &record),
        }
    }

    fn tell(&self, engine: EngineId, message: ToEngine) {
        self.engines.send(engine, message);
    }

    /// The checksum of each piece, if checksums are on.
    fn sums(&self, pieces: &[protocol::sender::Piece]) -> Vec<u64> {
        let Some(cut) = self.engines.cut().filter(|_| self.context.config.checksum) else {
            return Vec::new();
        };
        pieces
            .iter()
            .filter_map(|p| {
                let offset = u64::from(p.from.0) * cut.slot_bytes;
                self.buffer.sum(offset, p.bytes).ok()
            })
            .collect()
    }

    fn publish(&self) {
        let gauges = self.machine.as_ref().map(Sender::gauges);
        let Gauges {
            free,
            held,
            requests,
            ..
        } = gauges.unwrap_or_default();
        self.context.publish(
            Side::Sender,
            crate::side::Gauges {
                cut: self.engines.cut(),
                engines: self.engines.connected(),
                free,
                held,
                quarantined: 0,
                parked_tokens: 0,
                requests,
            },
            self.peers.links(),
        );
    }
}
