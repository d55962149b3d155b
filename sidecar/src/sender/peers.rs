//! Links to receivers: the init handshake, the chosen wire, and the socket to the alloc port.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
use crate::engines::Cut;
use crate::host;
use crate::init::{self, Identity};
use crate::lineage::Lineage;
use crate::side::LinkStatus;
use crate::transport::class::{Class, Ends};
use crate::transport::{Link, Outcome, Ready, Remote};
use crate::wires::Wires;
use crate::zmq::{DealerClient, FromServer};

use super::ranges::is_worth_dividing;

/// What comes from receivers.
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
    /// It sent what is no message.
    Malformed,
}

/// Whose receiver it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReceiverKind {
    /// A sidecar.
    Ours,
    /// LMCache's; the asynchronous one takes keys back.
    Lmcache { cancels: bool },
}

/// Every receiver that this rank is linked to.
#[derive(Debug)]
pub(super) struct Peers {
    wires: Wires,
    config: Arc<Config>,
    rank: u32,
    lineage: Lineage,
    cut: Option<Cut>,
    peers: BTreeMap<Target, Peer>,
    /// Counts handshakes, so that what an older one of the same receiver says is not taken for news.
    generation: u64,
    tasks: JoinSet<()>,
    events: mpsc::Sender<(u64, Internal)>,
    inbox: mpsc::Receiver<(u64, Internal)>,
}

#[derive(Debug)]
struct Peer {
    generation: u64,
    stop: CancellationToken,
    /// To the task that owns the alloc socket.
    outbox: mpsc::Sender<Vec<u8>>,
    link: Option<Arc<dyn Link>>,
    status: LinkStatus,
}

#[derive(Debug)]
enum Internal {
    Up(Target, Box<Made>),
    Failed(Target, Reason, String),
    Message(Target, ToSender),
    Malformed(Target),
    Lost(Target),
}

/// A handshake that went well.
#[derive(Debug)]
struct Made {
    /// Absent for LMCache.
    hello: Option<Hello>,
    kind: ReceiverKind,
    slots: u32,
    link: Arc<dyn Link>,
    why: String,
    class: Class,
}

impl Made {
    /// For people.
    fn name(&self) -> &str {
        match (&self.hello, self.kind) {
            (Some(hello), _) => &hello.id,
            (None, ReceiverKind::Lmcache { cancels: true }) => "LMCache (async)",
            (None, _) => "LMCache (sync)",
        }
    }
}

/// Messages to one receiver that may wait for its socket.
const OUTBOX: usize = 4096;
/// Messages of all receivers that may wait for the machine; beyond it their sockets push back.
const INBOX: usize = 4096;

impl Peers {
    pub(super) fn new(wires: Wires, config: Arc<Config>, rank: u32, lineage: Lineage) -> Self {
        let (events, inbox) = mpsc::channel(INBOX);
        Self {
            wires,
            config,
            rank,
            lineage,
            cut: None,
            peers: BTreeMap::new(),
            generation: 0,
            tasks: JoinSet::new(),
            events,
            inbox,
        }
    }

    /// The buffer has been cut (anew): links of the former cut are of no use.
    pub(super) fn begin(&mut self, cut: &Cut) {
        self.cut = Some(cut.clone());
        for peer in std::mem::take(&mut self.peers).into_values() {
            peer.stop.cancel();
        }
    }

    /// The next word of a receiver; never `None`.
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

    fn take(&mut self, generation: u64, event: Internal) -> Option<FromReceiver> {
        let (Internal::Up(to, _)
        | Internal::Failed(to, ..)
        | Internal::Message(to, _)
        | Internal::Malformed(to)
        | Internal::Lost(to)) = &event;
        let peer = self.peers.get_mut(to)?;
        if peer.generation != generation {
            return None;
        }
        match event {
            Internal::Up(to, made) => {
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
                peer.status.class = Some(made.class);
                peer.link = Some(made.link);
                Some(FromReceiver::Linked {
                    to,
                    epoch: made.hello.as_ref().map_or(Epoch(0), |h| h.epoch),
                    slots: made.slots,
                    transport: peer.status.transport.to_owned(),
                    kind: made.kind,
                })
            }
            Internal::Failed(to, reason, error) => {
                warn!(peer = peer.status.peer, %reason, error, "no link");
                peer.stop.cancel();
                self.peers.remove(&to);
                Some(FromReceiver::Lost(to, reason))
            }
            Internal::Message(to, message) => Some(FromReceiver::Message(to, message)),
            Internal::Malformed(_) => Some(FromReceiver::Malformed),
            Internal::Lost(to) => {
                warn!(peer = peer.status.peer, "receiver's connection lost");
                peer.stop.cancel();
                self.peers.remove(&to);
                Some(FromReceiver::Lost(to, Reason::PeerLost))
            }
        }
    }

    /// Makes the init handshake, anew if there is a link.
    pub(super) fn link(&mut self, to: Target) {
        let Some(cut) = self.cut.clone() else {
            return;
        };
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
            epoch: cut.epoch,
            layout: Some(cut.layout.clone()),
            transports: self.wires.adverts(),
            host: host::identity(),
            pid: std::process::id(),
            seal: self.lineage.seal.clone(),
            ended: self.lineage.ended.clone(),
            refused: None,
        };
        let identity = format!(
            "{}-{}-to-{}:{}",
            hello.id, cut.epoch, to.host, to.alloc_port
        );
        let status = LinkStatus::new(&to, self.config.transport.as_str());
        let task = PeerTask {
            to: to.clone(),
            generation,
            ours: Identity {
                hello,
                metadata: self.wires.metadata(),
                rows: self.wires.rows().into_iter().take(1).collect(),
                memory: self.wires.memory(),
                pages: Pages {
                    v: VERSION,
                    slots: 0,
                    slot_bytes: 0,
                },
            },
            wires: self.wires.clone(),
            deadline: self.config.times.link,
            events: self.events.clone(),
        };
        let stopped = stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = stopped.cancelled() => {}
                () = task.run(identity, outgoing) => {}
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
            return; // the machine has been told of the loss, or is about to be
        };
        if peer.outbox.try_send(codec::encode(message)).is_err() {
            warn!(
                peer = peer.status.peer,
                "receiver does not take messages: one is dropped"
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
                error: "the link is gone".to_owned(),
            })),
        }
    }

    /// Whether a write of so many bytes is worth dividing by layers, and where parts may begin.
    ///
    /// Decided by the rate that was measured: nothing is divided before there is one.
    pub(super) fn divides(&self, to: &Target, bytes: u64) -> Option<u64> {
        let peer = self.peers.get(to)?;
        peer.status
            .large_rate()
            .filter(|rate| is_worth_dividing(*rate, bytes, self.config.layers_below_gb_s))
            .and(peer.link.as_ref())
            .map(|link| link.granule())
    }

    /// Notes how fast a write was.
    pub(super) fn measured(&mut self, to: &Target, bytes: u64, began: Instant, ended: Instant) {
        if let Some(peer) = self.peers.get_mut(to) {
            peer.status.measured(bytes, began, ended);
            peer.status.judge(bytes);
        }
    }

    pub(super) fn links(&self) -> impl Iterator<Item = &LinkStatus> {
        self.peers.values().map(|p| &p.status)
    }

    /// Ends every connection.
    pub(super) async fn close(&mut self) {
        for peer in std::mem::take(&mut self.peers).into_values() {
            peer.stop.cancel();
        }
        self.tasks.shutdown().await;
    }
}

/// One receiver's connection, from the handshake to its loss.
#[derive(Debug)]
struct PeerTask {
    to: Target,
    generation: u64,
    /// A sender exports nothing: it has no pages, and a row only for LMCache, which insists on one.
    ours: Identity,
    wires: Wires,
    deadline: Duration,
    events: mpsc::Sender<(u64, Internal)>,
}

impl PeerTask {
    async fn run(self, identity: String, mut outgoing: mpsc::Receiver<Vec<u8>>) {
        let made = tokio::time::timeout(self.deadline, self.make()).await;
        let made = match made {
            Ok(Ok(made)) => made,
            Ok(Err((reason, error))) => {
                let to = self.to.clone();
                return self.say(Internal::Failed(to, reason, error)).await;
            }
            Err(_) => {
                let error = format!("no handshake within {:?}", self.deadline);
                let to = self.to.clone();
                return self.say(Internal::Failed(to, Reason::NoLink, error)).await;
            }
        };
        let dealer = DealerClient::connect(&self.to.host, self.to.alloc_port, &identity).await;
        let Ok(mut dealer) = dealer else {
            let error = "the alloc socket cannot be made".to_owned();
            let to = self.to.clone();
            return self.say(Internal::Failed(to, Reason::NoLink, error)).await;
        };
        let mut made = made;
        if made.hello.is_none() {
            let Some(cancels) = self.connected_to_router(&mut dealer).await else {
                let error = "its alloc port does not answer".to_owned();
                let to = self.to.clone();
                return self.say(Internal::Failed(to, Reason::NoLink, error)).await;
            };
            made.kind = ReceiverKind::Lmcache { cancels };
        }
        self.say(Internal::Up(self.to.clone(), Box::new(made)))
            .await;
        loop {
            tokio::select! {
                biased;
                Some(payload) = outgoing.recv() => {
                    if let Err(error) = dealer.send(payload) {
                        warn!(to = ?self.to, %error, "message to a receiver dropped");
                    }
                }
                received = dealer.recv() => match received {
                    Ok(FromServer::Connected { .. }) => {}
                    Ok(FromServer::Message(bytes)) => match codec::decode(&bytes) {
                        Ok(message) => {
                            self.say(Internal::Message(self.to.clone(), message)).await;
                        }
                        Err(error) => {
                            warn!(to = ?self.to, %error, "malformed message");
                            self.say(Internal::Malformed(self.to.clone())).await;
                        }
                    },
                    Ok(FromServer::Lost) | Err(_) => {
                        return self.say(Internal::Lost(self.to.clone())).await;
                    }
                }
            }
        }
    }

    async fn make(&self) -> Result<Made, (Reason, String)> {
        let linked = init::handshake(&self.to, &self.ours, self.deadline)
            .await
            .map_err(|e| (e.reason(), e.to_string()))?;
        let hello = linked.hello;
        let slots = linked.pages.slots;
        let mut remote = Remote {
            name: format!("{}:{}", self.to.host, self.to.init_port),
            metadata: linked.metadata,
            rows: linked.rows,
            memory: linked.memory,
            slots,
            slot_bytes: linked.pages.slot_bytes,
            address: None,
        };
        let mut failed = Vec::new();
        let (link, chosen) = loop {
            let (transport, chosen) = self
                .wires
                .choose(hello.as_ref(), &self.to.host, &failed)
                .map_err(|e| (e.reason(), e.to_string()))?;
            remote.address.clone_from(&chosen.address);
            match transport.link(remote.clone()).await {
                Ok(link) => break (link, chosen),
                // At most once a wire: one that has failed is not chosen again. LMCache has only one.
                Err(error) if self.wires.may_choose() && hello.is_some() => {
                    warn!(peer = error.peer, transport = %error.kind, error = error.cause, "a wire fails: trying the next");
                    failed.push((error.kind, error.cause));
                }
                Err(error) => return Err((Reason::NoLink, error.to_string())),
            }
        };
        let ends = Ends {
            ours: self.wires.memory(),
            theirs: remote.memory,
            same_host: hello
                .as_ref()
                .is_some_and(|hello| hello.host == host::identity()),
        };
        Ok(Made {
            hello,
            kind: ReceiverKind::Ours,
            class: Class::of(link.kind(), ends),
            slots,
            link,
            why: chosen.why,
        })
    }

    /// Waits for the connection to an LMCache receiver's alloc port; whether it is the asynchronous one's.
    async fn connected_to_router(&self, dealer: &mut DealerClient) -> Option<bool> {
        let connected = async {
            loop {
                match dealer.recv().await {
                    Ok(FromServer::Connected { router }) => return Some(router),
                    Ok(_) => {}
                    Err(_) => return None,
                }
            }
        };
        tokio::time::timeout(self.deadline, connected).await.ok()?
    }

    async fn say(&self, event: Internal) {
        // The owner is gone only when the process ends.
        let sent = self.events.send((self.generation, event)).await;
        debug_assert!(sent.is_ok() || self.events.is_closed());
    }
}
