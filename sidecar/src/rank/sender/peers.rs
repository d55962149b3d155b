//! Keeps the links to all receivers of a rank.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use common::identity::Role as Part;
use common::zmq::Protection;
use futures::future::BoxFuture;
use protocol::local::Target;
use protocol::message::{Hello, Pages, ToReceiver, ToSender};
use protocol::sender::Piece;
use protocol::{Epoch, LeaseId, Reason, VERSION, codec};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Config;
use crate::engine::sessions::SlotLayout;
use crate::net::host_id;
use crate::peer::handshake::Identity;
use crate::peer::process_lock::ProcessLock;
use crate::rank::context::LinkStatus;
use crate::transport::set::Wires;
use crate::transport::{Link, Outcome, Ready};

use super::connection::{Connection, News, ReceiverKind};
use super::ranges::is_worth_dividing;

/// An event from a receiver.
#[derive(Debug)]
pub(super) enum FromReceiver {
    Message(Target, ToSender),
    Linked {
        to: Target,
        epoch: Epoch,
        slots: u32,
        transport: String,
        kind: ReceiverKind,
    },
    Lost(Target, Reason),
    /// The receiver sent a frame that is not a valid message.
    Malformed,
}

/// All receivers that this rank is linked to.
#[derive(Debug)]
pub(super) struct Peers {
    wires: Wires,
    config: Arc<Config>,
    rank: u32,
    process_lock: ProcessLock,
    slot_layout: Option<SlotLayout>,
    peers: BTreeMap<Target, Peer>,
    /// The number of the latest handshake. Events of an older connection to the same receiver have a smaller
    /// number and are ignored.
    generation: u64,
    tasks: JoinSet<()>,
    events: mpsc::Sender<(u64, News)>,
    inbox: mpsc::Receiver<(u64, News)>,
}

#[derive(Debug)]
struct Peer {
    generation: u64,
    stop: CancellationToken,
    /// The queue to the task that owns the alloc socket.
    outbox: mpsc::Sender<Vec<u8>>,
    link: Option<Arc<dyn Link>>,
    status: LinkStatus,
}

/// Maximum number of messages to one receiver that wait for its socket.
const OUTBOX: usize = 4096;
/// Maximum number of events of all receivers that wait for the machine. When the queue is full, the connections
/// stop reading (backpressure).
const INBOX: usize = 4096;

impl Peers {
    pub(super) fn new(
        wires: Wires,
        config: Arc<Config>,
        rank: u32,
        process_lock: ProcessLock,
    ) -> Self {
        let (events, inbox) = mpsc::channel(INBOX);
        Self {
            wires,
            config,
            rank,
            process_lock,
            slot_layout: None,
            peers: BTreeMap::new(),
            generation: 0,
            tasks: JoinSet::new(),
            events,
            inbox,
        }
    }

    /// Sets a new slot layout and ends all links, because they belong to the former layout.
    pub(super) fn begin(&mut self, slot_layout: &SlotLayout) {
        self.slot_layout = Some(slot_layout.clone());
        for peer in std::mem::take(&mut self.peers).into_values() {
            peer.stop.cancel();
        }
    }

    /// Returns the next event of a receiver; never `None`.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Option<FromReceiver> {
        loop {
            let (generation, event) = tokio::select! {
                biased;
                received = self.inbox.recv() => received?,
                Some(ended) = self.tasks.join_next() => {
                    if let Err(error) = ended
                        && error.is_panic()
                    {
                        std::panic::resume_unwind(error.into_panic());
                    }
                    continue;
                }
            };
            if let Some(news) = self.take(generation, event) {
                return Some(news);
            }
        }
    }

    fn take(&mut self, generation: u64, event: News) -> Option<FromReceiver> {
        let (News::Up(to, _)
        | News::Failed(to, ..)
        | News::Message(to, _)
        | News::Malformed(to)
        | News::Lost(to)) = &event;
        let peer = self.peers.get_mut(to)?;
        // An earlier connection to this receiver may still send events, which must not end the newer
        // connection.
        if peer.generation != generation {
            return None;
        }
        match event {
            News::Up(to, made) => {
                info!(
                    peer = peer.status.peer,
                    receiver = made.name(),
                    transport = %made.link.kind(),
                    reported = made.link.reported(),
                    why = made.why,
                    "linked"
                );
                peer.status.id = made.name().to_owned();
                peer.status.transport = made.link.kind().as_str();
                peer.status.reported = made.link.reported();
                peer.status.why = made.why;
                peer.status.expected_rate = Some(made.expected_rate);
                peer.link = Some(made.link);
                Some(FromReceiver::Linked {
                    to,
                    epoch: made.hello.as_ref().map_or(Epoch(0), |h| h.epoch),
                    slots: made.slots,
                    transport: peer.status.transport.to_owned(),
                    kind: made.kind,
                })
            }
            News::Failed(to, reason, error) => {
                warn!(peer = peer.status.peer, %reason, error, "no link");
                // Without the entry, the next request to this receiver makes a new connection.
                peer.stop.cancel();
                self.peers.remove(&to);
                Some(FromReceiver::Lost(to, reason))
            }
            News::Message(to, message) => Some(FromReceiver::Message(to, message)),
            News::Malformed(_) => Some(FromReceiver::Malformed),
            // The machine ends the receiver's requests, so the task of the connection has no more work.
            News::Lost(to) => {
                warn!(
                    peer = peer.status.peer,
                    "lost the connection to the receiver"
                );
                peer.stop.cancel();
                self.peers.remove(&to);
                Some(FromReceiver::Lost(to, Reason::PeerLost))
            }
        }
    }

    /// Makes the init handshake with a receiver. First ends an existing link to this receiver.
    pub(super) fn link(&mut self, to: Target) {
        let Some(slot_layout) = self.slot_layout.clone() else {
            return;
        };
        // The former connection's events must not reach the machine, so the connection is stopped and the
        // generation is raised.
        if let Some(former) = self.peers.remove(&to) {
            former.stop.cancel();
        }
        self.generation += 1;
        let generation = self.generation;
        let stop = CancellationToken::new();
        let (outbox, outgoing) = mpsc::channel(OUTBOX);
        let hello = Hello {
            v: VERSION,
            id: self.config.rank_id(self.rank),
            epoch: slot_layout.epoch,
            layout: Some(slot_layout.layout.clone()),
            transports: self.wires.adverts(),
            host: host_id::identity(),
            pid: std::process::id(),
            seal: self.process_lock.proof_hash.clone(),
            ended: self.process_lock.proofs.clone(),
            refused: None,
        };
        // A ROUTER socket assigns an identity to the first peer that presents it. This identity has a secret
        // part, so that no other peer can guess it and present it first.
        let secret: u64 = rand::random();
        let identity = format!(
            "{}-{}-{secret:016x}-to-{}:{}",
            hello.id, slot_layout.epoch, to.host, to.alloc_port
        );
        let fields = self.wires.handshake_fields();
        let status = LinkStatus::new(&to, self.config.transport.as_str());
        let connection = Connection {
            to: to.clone(),
            generation,
            ours: Identity {
                hello,
                metadata: fields.metadata,
                rows: fields.rows.into_iter().take(1).collect(),
                memory: self.wires.memory(),
                pages: Pages {
                    v: VERSION,
                    slots: 0,
                    slot_bytes: 0,
                },
            },
            wires: self.wires.clone(),
            protection: Protection::of(self.config.identity.as_ref(), &[Part::Receiver]),
            deadline: self.config.times.link,
            events: self.events.clone(),
        };
        let stopped = stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = connection.run(identity, outgoing) => {}
            }
        });
        let peer = Peer {
            generation,
            stop,
            outbox,
            link: None,
            status,
        };
        self.peers.insert(to, peer);
    }

    pub(super) fn send(&self, to: &Target, message: &ToReceiver) {
        let Some(peer) = self.peers.get(to) else {
            return; // the machine knows about the loss, or learns of it soon
        };
        if peer.outbox.try_send(codec::encode(message)).is_err() {
            warn!(
                peer = peer.status.peer,
                "message dropped: the receiver does not take messages"
            );
        }
    }

    pub(super) fn write(
        &self,
        to: &Target,
        ready: Ready,
        lease: LeaseId,
        pieces: Vec<Piece>,
    ) -> BoxFuture<'static, Outcome> {
        match self.peers.get(to).and_then(|p| p.link.as_ref()) {
            Some(link) => link.write_when(ready, lease, pieces),
            None => Box::pin(std::future::ready(Outcome::Failed {
                terminal: true,
                error: "the link has ended".to_owned(),
            })),
        }
    }

    /// Returns the link's granule in bytes: parts of a write begin at multiples of the granule. Returns `None`
    /// if it saves no time to divide a write of this size by layers.
    ///
    /// The measured rate of the link decides, so no write is divided before a large write was measured.
    pub(super) fn divides(&self, to: &Target, bytes: u64) -> Option<u64> {
        let peer = self.peers.get(to)?;
        peer.status
            .large_rate()
            .filter(|rate| is_worth_dividing(*rate, bytes, self.config.layers_below_gb_s))
            .and(peer.link.as_ref())
            .map(|link| link.granule())
    }

    /// Adds a write to the measured rate of a link and logs a warning if the link is far too slow.
    pub(super) fn measured(&mut self, to: &Target, bytes: u64, began: Instant, ended: Instant) {
        if let Some(peer) = self.peers.get_mut(to) {
            peer.status.measured(bytes, began, ended);
            peer.status.judge(bytes);
        }
    }

    /// Returns true if there is a link and a part of it is broken.
    pub(super) fn is_broken(&self, to: &Target) -> bool {
        let link = self.peers.get(to).and_then(|p| p.link.as_ref());
        link.is_some_and(|link| link.is_broken())
    }

    pub(super) fn links(&self) -> impl Iterator<Item = &LinkStatus> {
        self.peers.values().map(|p| &p.status)
    }

    /// Ends every connection and waits for its task.
    pub(super) async fn close(&mut self) {
        for peer in std::mem::take(&mut self.peers).into_values() {
            peer.stop.cancel();
        }
        self.tasks.shutdown().await;
    }
}
