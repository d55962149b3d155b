//! Runs one process: the roles of every rank, the engines' socket, and the observer. The node owns all tasks;
//! the first task that ends stops the others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::identity::Role as Part;
use common::zmq::{MAX_ALLOC_BYTES, MAX_INIT_BYTES, Protection, RouterServer};
use protocol::EngineId;
use protocol::Reason;
use protocol::local::{EngineRole, Keeper, Refused, Target, ToEngine};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::{Config, Listen, RankPorts, Role};
use crate::engine::drain::Drain;
use crate::engine::socket::{FromEngine, Listener};
use crate::memory::Buffer;
use crate::peer::process_lock::ProcessLock;
use crate::rank::context::{Observer, RankContext, RankRole};
use crate::rank::metrics::RankMetrics;
use crate::rank::receiver::ReceiverTask;
use crate::rank::recorder::Trace;
use crate::rank::sender::{FetchPort, SenderTask};
use crate::transport::set::Wires;
use crate::transport::spec::{DataPort, Start};

/// Maximum number of messages of engines that wait for one role. If the queue is full, the dispatcher and the
/// engines' sockets wait.
const QUEUE: usize = 256;

/// The error that a resource is not available at the start. The process then exits with code 69.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct StartError(#[from] anyhow::Error);

/// A sidecar after its start: its ports are bound and its buffers are allocated.
#[derive(Debug)]
pub(crate) struct Node {
    config: Arc<Config>,
    tasks: JoinSet<()>,
    /// The tasks of the engines' socket and its dispatcher. The tasks stop when the node is dropped.
    _services: JoinSet<()>,
    drain: Drain,
    stop: CancellationToken,
    targets: Vec<Target>,
    ports: BTreeMap<u16, String>,
    buffers: BTreeMap<(RankRole, u32), Arc<Buffer>>,
    _listener: Listener,
}

/// The inboxes for engine events, by role and rank.
type EngineInboxes = BTreeMap<(RankRole, u32), mpsc::Sender<FromEngine>>;

impl Node {
    /// Allocates buffers, binds ports and starts every task.
    ///
    /// # Errors
    /// Fails at the first resource that is not available.
    pub(crate) async fn start(
        config: Arc<Config>,
        observer: Arc<dyn Observer>,
        metrics: Arc<RankMetrics>,
    ) -> Result<Self, StartError> {
        let trace = match &config.trace {
            None => Trace::default(),
            Some(path) => Trace::to_file(path).map_err(|e| {
                anyhow::anyhow!("cannot write the trace to {}: {e}", path.display())
            })?,
        };
        let mut node = Builder {
            tasks: JoinSet::new(),
            inboxes: EngineInboxes::new(),
            targets: Vec::new(),
            ports: BTreeMap::new(),
            buffers: BTreeMap::new(),
            drain: Drain::new(),
            stop: CancellationToken::new(),
            config: Arc::clone(&config),
            process_lock: if config.sends() {
                ProcessLock::beside(&config.socket)
            } else {
                ProcessLock::default()
            },
            observer,
            metrics,
            trace,
        };
        // Each rank allocates its buffer and binds its ports before the engines' socket exists, so that an
        // engine never connects to a sidecar that cannot serve it.
        for rank in 0..config.ranks {
            if config.role != Role::Receiver {
                node.sender(rank).await?;
            }
            if config.role != Role::Sender {
                node.receiver(rank).await?;
            }
        }
        let mut services = JoinSet::new();
        let (listener, engines) = Listener::bind(&config.socket, &mut services, node.drain.clone())
            .map_err(anyhow::Error::from)?;
        info!(socket = %config.socket.display(), "waiting for the engine");
        services.spawn(dispatch(engines, node.inboxes, config.ranks, node.metrics));
        Ok(Self {
            config,
            tasks: node.tasks,
            _services: services,
            drain: node.drain,
            stop: node.stop,
            targets: node.targets,
            ports: node.ports,
            buffers: node.buffers,
            _listener: listener,
        })
    }

    /// Returns the address of a rank's receiver for senders, with the ports that were bound; `None` if the
    /// rank has no receiver.
    pub(crate) fn target(&self, rank: usize) -> Option<Target> {
        self.targets.get(rank).cloned()
    }

    /// Returns the TCP ports that were bound, with the name of each.
    pub(crate) fn ports(&self) -> &BTreeMap<u16, String> {
        &self.ports
    }

    /// Returns the buffers of rank 0.
    pub(crate) fn buffers(&self) -> BTreeMap<RankRole, Arc<Buffer>> {
        let first = self.buffers.iter().filter(|((_, rank), _)| *rank == 0);
        first
            .map(|((role, _), buffer)| (*role, Arc::clone(buffer)))
            .collect()
    }

    /// Returns the drain: no new requests begin, and requests in flight may end.
    pub(crate) fn drain(&self) -> Drain {
        self.drain.clone()
    }

    /// Runs until every role has ended after a drain, until the drain's grace period is over, or until a role
    /// ends by itself. Then stops all tasks. The grace period lasts until decode sides have fetched all kept KV,
    /// at most for `max_keep`.
    pub(crate) async fn run(mut self) -> Ended {
        let (grace, max_keep) = (self.config.times.drain, self.config.times.max_keep);
        let drain = self.drain.clone();
        let late = async {
            drain.ends().await;
            let long = async {
                tokio::time::sleep(grace).await;
                drain.fetched().await;
                // The senders end a moment after their last KV is fetched.
                tokio::time::sleep(CLOSING).await;
            };
            // All KV expires within `max_keep`. This limit also holds if a fetch does not end.
            let limit = grace.max(max_keep) + CLOSING;
            tokio::time::timeout(limit, long).await.ok();
        };
        tokio::pin!(late);
        let ended = loop {
            tokio::select! {
                biased;
                Some(task) = self.tasks.join_next() => match task {
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    _ if !self.drain.is_ending() => break Ended::Broken,
                    _ if self.tasks.is_empty() => break Ended::Drained,
                    _ => {}
                },
                () = &mut late => {
                    let kept = drain.unfetched();
                    warn!(?grace, kept, "stopping with requests under way, KV that no decode side has fetched, or slots in quarantine: the grace period is over");
                    break Ended::Busy;
                }
            }
        };
        self.stop.cancel();
        // The roles close their sockets, so that peers see the end at once and need not wait for a deadline.
        let closing = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(CLOSING, closing).await.is_err() {
            warn!("sockets did not close in {CLOSING:?}");
        }
        ended
    }
}

/// The reason why [`Node::run`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The drain ended because no request was in flight any more.
    Drained,
    /// The grace period was over while requests were in flight or slots were quarantined.
    Busy,
    /// A role ended by itself, without a drain.
    Broken,
}

/// The time within which sockets must close.
const CLOSING: Duration = Duration::from_secs(1);

/// The parts of a node that [`Node::start`] has made so far.
struct Builder {
    tasks: JoinSet<()>,
    inboxes: EngineInboxes,
    targets: Vec<Target>,
    ports: BTreeMap<u16, String>,
    buffers: BTreeMap<(RankRole, u32), Arc<Buffer>>,
    drain: Drain,
    stop: CancellationToken,
    config: Arc<Config>,
    process_lock: ProcessLock,
    observer: Arc<dyn Observer>,
    metrics: Arc<RankMetrics>,
    trace: Trace,
}

impl Builder {
    async fn sender(&mut self, rank: u32) -> Result<(), StartError> {
        let buffer = self.buffer(RankRole::Sender, rank)?;
        let wires = self.wires(rank, &buffer, None)?;
        self.observer.wires(RankRole::Sender, rank, wires.clone());
        let fetch = self.fetch_port(rank).await?;
        let context = self.context(rank, wires);
        let task = SenderTask::new(context, buffer, self.process_lock.clone(), fetch);
        let engines = self.inbox(RankRole::Sender, rank);
        self.tasks
            .spawn(task.run(engines, self.drain.clone(), self.stop.clone()));
        Ok(())
    }

    /// Binds a rank's fetch port, if one is configured.
    async fn fetch_port(&mut self, rank: u32) -> Result<Option<FetchPort>, StartError> {
        let Some(listen) = self.config.fetch.clone() else {
            return Ok(None);
        };
        let port = match listen.port {
            0 => 0,
            // `Config` has checked that every rank has a port.
            first => first.saturating_add(u16::try_from(rank).unwrap_or(u16::MAX)),
        };
        let protection = Protection::of(self.config.identity.as_ref(), &[Part::Receiver]);
        let server = RouterServer::bind(&listen.host, port, MAX_ALLOC_BYTES, &protection)
            .await
            .map_err(anyhow::Error::from)?;
        self.observer.port(rank, "fetch", server.traffic());
        self.ports
            .insert(server.port(), format!("fetch of rank {rank}"));
        info!(
            rank,
            host = listen.host,
            fetch = server.port(),
            "port bound"
        );
        let announced = Keeper {
            host: listen.advertise,
            port: server.port(),
        };
        Ok(Some(FetchPort { server, announced }))
    }

    async fn receiver(&mut self, rank: u32) -> Result<(), StartError> {
        let buffer = self.buffer(RankRole::Receiver, rank)?;
        let listen = self.config.listen.clone();
        let ports = listen.as_ref().and_then(|l| l.ranks.get(rank as usize));
        let (
            Some(listen),
            Some(&RankPorts {
                init,
                alloc,
                query,
                tcp,
            }),
        ) = (&listen, ports)
        else {
            // `Config` has checked that a receiver has ports for every rank.
            return Err(anyhow::anyhow!("no ports for rank {rank}").into());
        };
        // No sender can reach this rank without its ports, so the start fails if a port cannot be bound.
        let senders = Protection::of(self.config.identity.as_ref(), &[Part::Sender]);
        let bind = async |port, bytes, protection| {
            RouterServer::bind(&listen.host, port, bytes, protection).await
        };
        let init = bind(init, MAX_INIT_BYTES, &senders)
            .await
            .map_err(anyhow::Error::from)?;
        let alloc = bind(alloc, MAX_ALLOC_BYTES, &senders)
            .await
            .map_err(anyhow::Error::from)?;
        let query = match query {
            Some(port) => Some(
                // Only LMCache's senders ask on this port, and they know no keys. The answer is always empty.
                bind(port, MAX_ALLOC_BYTES, &Protection::Plain)
                    .await
                    .map_err(anyhow::Error::from)?,
            ),
            None => None,
        };
        // The table of bound ports tells the admin server's user what each port is for.
        for (name, port) in [
            ("init", Some(&init)),
            ("alloc", Some(&alloc)),
            ("query", query.as_ref()),
        ] {
            if let Some(port) = port {
                self.observer.port(rank, name, port.traffic());
                self.ports
                    .insert(port.port(), format!("{name} of rank {rank}"));
            }
        }
        info!(
            rank,
            host = listen.host,
            init = init.port(),
            alloc = alloc.port(),
            "ports bound"
        );
        // `selftest` asks for port 0, so the target has the port that was bound.
        let target = Target {
            host: listen.advertise.clone(),
            init_port: init.port(),
            alloc_port: alloc.port(),
        };
        self.targets.push(target.clone());
        // The wires start after the buffer, because they register it with their libraries.
        let wires = self.wires(rank, &buffer, Some((listen, tcp)))?;
        for (kind, port) in wires.data_ports() {
            self.ports
                .insert(port, format!("{kind} data of rank {rank}"));
        }
        self.observer.wires(RankRole::Receiver, rank, wires.clone());
        let task = ReceiverTask::new(
            self.context(rank, wires),
            buffer,
            init,
            alloc,
            query,
            target,
        );
        let engines = self.inbox(RankRole::Receiver, rank);
        self.tasks
            .spawn(task.run(engines, self.drain.clone(), self.stop.clone()));
        Ok(())
    }

    fn wires(
        &self,
        rank: u32,
        buffer: &Arc<Buffer>,
        listen: Option<(&Listen, u16)>,
    ) -> anyhow::Result<Wires> {
        let with = Start {
            buffer,
            rank,
            id: &self.config.rank_id(rank),
            link: self.config.times.link,
            stall: self.config.times.stall,
            identity: self.config.identity.as_ref(),
            data: self.config.data,
            listen: listen.map(|(listen, port)| DataPort {
                host: &listen.host,
                advertise: &listen.advertise,
                port,
            }),
        };
        Wires::start(self.config.transport, with)
    }

    fn buffer(&mut self, role: RankRole, rank: u32) -> Result<Arc<Buffer>, StartError> {
        let name = format!("pd-{}-{rank}", role.as_str());
        let bytes = self.config.buffer_bytes;
        let device = self
            .config
            .devices
            .get(rank as usize)
            .and_then(Option::as_ref);
        let buffer = match device {
            None => {
                Buffer::memfd(&name, bytes).map_err(|e| anyhow::anyhow!("pd_buffer_size: {e}"))?
            }
            Some(which) => Buffer::on_gpu(which, bytes)
                .map_err(|e| anyhow::anyhow!("pd_buffer_device: {e}"))?,
        };
        let gpu = buffer.cuda().map(|memory| memory.device().to_string());
        info!(side = role.as_str(), rank, bytes, gpu, "buffer taken");
        self.buffers.insert((role, rank), Arc::clone(&buffer));
        Ok(buffer)
    }

    fn context(&self, rank: u32, wires: Wires) -> RankContext {
        RankContext {
            config: Arc::clone(&self.config),
            rank,
            wires,
            trace: self.trace.of_rank(rank),
            observer: Arc::clone(&self.observer),
            metrics: Arc::clone(&self.metrics),
        }
    }

    fn inbox(&mut self, role: RankRole, rank: u32) -> mpsc::Receiver<FromEngine> {
        let (inbox, engines) = mpsc::channel(QUEUE);
        self.inboxes.insert((role, rank), inbox);
        engines
    }
}

/// Passes each engine's events to the role and rank that the engine named in its hello.
async fn dispatch(
    mut engines: mpsc::Receiver<FromEngine>,
    inboxes: EngineInboxes,
    ranks: u32,
    metrics: Arc<RankMetrics>,
) {
    let mut by_engine: BTreeMap<EngineId, mpsc::Sender<FromEngine>> = BTreeMap::new();
    while let Some(event) = engines.recv().await {
        let inbox = match &event {
            FromEngine::Hello(connection, hello) => {
                let role = match hello.role {
                    EngineRole::Prefill => RankRole::Sender,
                    EngineRole::Decode => RankRole::Receiver,
                };
                let inbox = inboxes.get(&(role, hello.rank));
                // An engine with another number of ranks would send parts of KV that no receiver expects.
                let Some(inbox) = inbox.filter(|_| hello.world_size == ranks) else {
                    let text = format!(
                        "this sidecar has no {} for rank {} of {}: it has {ranks} ranks; check its --role, and \
                         its number of ports or, for a sender, sidecar.ranks",
                        role.as_str(),
                        hello.rank,
                        hello.world_size
                    );
                    warn!(engine = hello.engine, "engine refused: {text}");
                    let reason = Reason::BadRequest;
                    metrics.engine_refused(role, reason);
                    connection.refuse(ToEngine::Refused(Refused { reason, text }));
                    continue;
                };
                by_engine.insert(connection.id(), inbox.clone());
                Some(inbox.clone())
            }
            FromEngine::Message(id, _) => by_engine.get(id).cloned(),
            FromEngine::Gone(id) => by_engine.remove(id),
            FromEngine::Malformed => {
                metrics.malformed.count("local");
                None
            }
        };
        if let Some(inbox) = inbox
            && inbox.send(event).await.is_err()
        {
            warn!("engine message dropped: the task of its role has ended");
        }
    }
}
