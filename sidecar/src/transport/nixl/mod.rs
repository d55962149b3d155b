//! Writes with NIXL and its UCX backend: shared memory, RDMA, NVLink, TCP.
//!
//! One engine thread owns the agent and everything made from the agent; the rest of the process sends
//! commands to the thread. The thread polls only while a write is in flight or announced, and sleeps
//! otherwise. (The library's own progress thread would use a whole core even when idle.) An idle thread polls
//! ten times per second, so that it answers a peer that connects before its writes are announced (LMCache).
//!
//! | file | |
//! |---|---|
//! | [`command`] | the requests to the thread, and the answers |
//! | [`engine`] | the thread: commands, polling, sleeping, the end |
//! | [`peer`] | one receiver: its writes are queued, posted, polled and abandoned |
//! | [`descriptor_layout`] | slots as descriptors, writes as batches of descriptors |
//! | [`wire`] | the best size of descriptors for the wire below |
//! | [`poll_backoff`] | the pauses between polls |
//! | [`counts`] | counts of events, for metrics |
//! | [`link`] | the sending half of the trait |

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use futures::future::BoxFuture;
use protocol::dlist::{self, Row};
use protocol::message::Advert;
use protocol::{LeaseId, SlotIndex};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::expected_rate::{Ends, ExpectedRate};
use super::rdma::{Settings, View};
use super::spec::{Spec, Start};
use super::ucx::{CONSENT, TLS, names_tcp};
use super::{HandshakeFields, Kind, Link, LinkError, Remote, Transport};
use crate::memory::Buffer;
use crate::memory::cuda::CudaError;

mod command;
mod counts;
mod descriptor_layout;
mod engine;
mod link;
mod peer;
mod poll_backoff;
mod wire;

use command::Command;
use counts::Counters;
use engine::Engine;

use ::nixl::{Library, Search};

/// NIXL with its UCX backend: shared memory, RDMA, NVLink, TCP.
pub(crate) const KIND: Kind = Kind(&Spec {
    name: "nixl",
    library: Some(library),
    needs_gpu: false,
    uses_ucx: true,
    protects_data: false,
    lmcache_has_it: true,
    absence: Some("no NIXL, so the built-in TCP transport is used"),
    start,
    // The agent's metadata is the address.
    address: |_, _| Ok(None),
    expected_rate,
});

fn library() -> Result<String, String> {
    let found = Library::load(&Search::from_env()).map_err(|error| error.to_string())?;
    let version = found.version().unwrap_or("of unknown version");
    Ok(format!("NIXL {version}, {}", found.path().display()))
}

/// Returns the NIXL library that a start tries first; `None` if there is none.
pub(super) fn first_library() -> Option<PathBuf> {
    Search::from_env().first()
}

fn start(with: &Start<'_>) -> anyhow::Result<Arc<dyn Transport>> {
    // UCX does not say why it cannot use an RDMA device, so the reasons come before its own text.
    let complaints = first_library().map_or_else(Vec::new, |nixl| rdma(&nixl).complaints());
    for complaint in &complaints {
        tracing::warn!("{complaint}");
    }
    start_agent(with).map_err(|error| {
        complaints
            .into_iter()
            .rev()
            .fold(error, anyhow::Error::context)
    })
}

/// Returns the RDMA devices as the NIXL library `nixl` sees them.
fn rdma(nixl: &Path) -> View {
    View::new(Path::new("/"), nixl, Settings::of_process())
}

fn start_agent(with: &Start<'_>) -> anyhow::Result<Arc<dyn Transport>> {
    let library = Library::load(&Search::from_env())?;
    // Peers know agents by their names, so an agent after a restart must have a new name.
    let agent = format!("{}-{:016x}", with.id, rand::random::<u64>());
    let gpu = with.buffer.cuda();
    let device = gpu.map_or(with.rank, |gpu| gpu.device().ordinal());
    let config = Config {
        link: with.link,
        stall: with.stall,
        ..Config::new(agent, u64::from(device))
    };
    let started = Nixl::start(library, config, Arc::clone(with.buffer))?;
    Ok(Arc::new(started))
}

fn expected_rate(ends: Ends) -> ExpectedRate {
    if ends.ours != dlist::Memory::Vram || ends.theirs != dlist::Memory::Vram {
        return ExpectedRate::of_a_network();
    }
    if ends.same_host {
        // If UCX cannot export the memory, the rate is 0.54 GB/s (measured). The slowest bus is ten times as
        // fast.
        return ExpectedRate {
            least_gb_s: 5.0,
            hint: "UCX stages through sockets: let UCX_TLS name cuda_ipc and cuda_copy, let both \
                   sidecars share IPC and PID namespaces, or set transport to cuda_ipc",
        };
    }
    ExpectedRate {
        least_gb_s: 1.0,
        hint: "UCX found no RDMA device that reaches GPU memory: check UCX_NET_DEVICES, and that \
               nvidia-peermem or dma-buf is there",
    }
}

/// The names and time limits of the transport.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The agent's name. Each start needs a new name, because peers know agents by their names.
    pub(crate) agent: String,
    /// NIXL's device id of the buffer. For GPU memory this id is the GPU's number in this process, which UCX
    /// checks. For host memory the id is the tensor-parallel rank, as in LMCache.
    pub(crate) device: u64,
    /// Backend parameters that differ from the plugin's defaults.
    pub(crate) params: Vec<(String, String)>,
    /// Time limit for making a link.
    pub(crate) link: Duration,
    /// If a write makes no progress for this time, its caller gets an error. The thread then polls the write
    /// until it ends.
    pub(crate) stall: Duration,
    /// Time limit for writes in flight when the transport stops.
    pub(crate) drain: Duration,
}

impl Config {
    /// Returns the defaults for a rank.
    pub(crate) fn new(agent: impl Into<String>, device: u64) -> Self {
        Self {
            agent: agent.into(),
            device,
            params: Vec::new(),
            link: Duration::from_secs(5),
            stall: Duration::from_secs(10),
            drain: Duration::from_secs(2),
        }
    }
}

/// Both halves of the transport over one buffer.
///
/// When the transport is dropped, it waits for the engine thread, at most for [`Config::drain`].
#[derive(Debug)]
pub(crate) struct Nixl {
    shared: Arc<Shared>,
    metadata: Vec<u8>,
    slot_bytes: AtomicU64,
    slots: AtomicU64,
    address: u64,
    device: u64,
    wire: wire::Wire,
    on_gpu: bool,
    thread: Option<JoinHandle<()>>,
}

/// The state that the engine thread and its clients share.
#[derive(Debug)]
struct Shared {
    commands: mpsc::Sender<Command>,
    /// The permits that limit the length of the command queue; each link or write command has one permit.
    permits: Arc<Semaphore>,
    /// True while peers have announced writes into this buffer.
    expecting: AtomicBool,
    counters: Counters,
    /// The value of `UCX_TLS`, or `auto`, for people.
    ucx_tls: String,
    /// True if UCX may use TCP.
    over_tcp: bool,
    /// True if NIXL can use an RDMA device of this host.
    rdma: bool,
    link: Duration,
}

impl Nixl {
    /// Starts the engine thread and registers the whole buffer, which takes hundreds of milliseconds.
    ///
    /// # Errors
    /// The library or the GPU driver refuses, or the kernel starts no thread.
    pub(crate) fn start(
        library: &'static Library,
        config: Config,
        buffer: Arc<Buffer>,
    ) -> Result<Self, StartError> {
        // UCX itself reads this variable, so a setting of the sidecar cannot replace it.
        let ucx_tls = std::env::var(TLS).ok().filter(|tls| !tls.is_empty());
        let over_tcp = ucx_tls.as_deref().is_none_or(names_tcp);
        let on_gpu = buffer.cuda().is_some();
        let place = if on_gpu {
            wire::Place::Gpu
        } else {
            wire::Place::Host
        };
        let rdma = rdma(library.path()).is_usable();
        let wire = wire::Wire::judge(ucx_tls.as_deref(), rdma, place);
        let (commands, queue) = mpsc::channel();
        let shared = Arc::new(Shared {
            commands,
            permits: Arc::new(Semaphore::new(QUEUE)),
            expecting: AtomicBool::new(false),
            counters: Counters::default(),
            ucx_tls: ucx_tls.unwrap_or_else(|| "auto".to_owned()),
            over_tcp,
            rdma,
            link: config.link,
        });
        // The buffer moves to the thread, so its address is read first.
        let address = buffer.address() as u64;
        let device = config.device;
        // The agent is made on the thread that will use it, because it cannot move between threads. This
        // channel returns the result.
        let (started, outcome) = mpsc::sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("nixl-{device}"))
            .spawn({
                let shared = Arc::clone(&shared);
                move || match Engine::new(library, config, wire, buffer, shared, queue) {
                    Ok((engine, metadata)) => {
                        if started.send(Ok(metadata)).is_ok() {
                            engine.run();
                        }
                    }
                    // The other end of the channel waits below, so the send does not fail.
                    Err(error) => drop(started.send(Err(error))),
                }
            })
            .map_err(StartError::Thread)?;
        let metadata = match outcome.recv() {
            Ok(Ok(metadata)) => metadata,
            Ok(Err(error)) => return Err(StartError::Nixl(error)),
            Err(_) => return Err(StartError::Panicked),
        };
        Ok(Self {
            shared,
            metadata,
            slot_bytes: AtomicU64::new(0),
            slots: AtomicU64::new(0),
            address,
            device,
            wire,
            on_gpu,
            thread: Some(thread),
        })
    }

    /// Returns the memory range of each slot; empty before the first slot layout.
    fn rows(&self) -> Vec<Row> {
        let slots = self.slots.load(Ordering::Acquire);
        let bytes = self.slot_bytes.load(Ordering::Acquire);
        (0..slots)
            .map(|slot| Row {
                address: self.address + slot * bytes,
                bytes,
                device: self.device,
            })
            .collect()
    }
}

impl Transport for Nixl {
    fn kind(&self) -> Kind {
        KIND
    }

    fn advert(&self) -> Advert {
        Advert {
            kind: KIND.as_str().to_owned(),
            // The agent's metadata is the address, so the advert needs no address.
            address: String::new(),
        }
    }

    fn handshake_fields(&self) -> Option<HandshakeFields> {
        Some(HandshakeFields {
            metadata: self.metadata.clone(),
            rows: self.rows(),
        })
    }

    fn reaches(&self, _advert: &Advert, same_host: bool) -> Result<(), String> {
        if same_host || self.shared.over_tcp || self.shared.rdma {
            return Ok(());
        }
        Err(format!(
            "without RDMA nixl reaches another host only over TCP, at ports that UCX opens; {CONSENT}"
        ))
    }

    fn poor(&self, same_host: bool) -> Option<String> {
        let poor = || self.wire.poor(same_host, self.shared.rdma);
        self.on_gpu.then(poor).flatten()
    }

    fn divide(&self, slots: u32, slot_bytes: u64) {
        // While the slot size changes, the number of slots is 0, so that no reader combines an old and a new
        // value.
        self.slots.store(0, Ordering::Release);
        self.slot_bytes.store(slot_bytes, Ordering::Release);
        self.slots.store(slots.into(), Ordering::Release);
        self.shared.send(Command::Divide { slots, slot_bytes });
    }

    fn link(&self, remote: Remote) -> BoxFuture<'static, Result<Arc<dyn Link>, LinkError>> {
        Box::pin(link::connect(Arc::clone(&self.shared), remote))
    }

    fn open(&self, _lease: LeaseId, _owner: Option<&Arc<str>>, _slot: SlotIndex) {
        // Writes are one-sided: this process cannot stop a peer from writing. Peers observe the leases because
        // they follow the protocol.
    }

    fn close(&self, _slot: SlotIndex) {}

    fn close_is_a_fence(&self) -> bool {
        false
    }

    fn events(&self) -> Vec<(&'static str, u64)> {
        let counts = self.shared.counters.read();
        vec![
            ("writes_done", counts.done),
            ("writes_failed", counts.failed),
            ("writes_uncertain", counts.uncertain),
            ("bytes_written", counts.bytes),
            ("peers", counts.peers),
            ("writes_stuck", counts.stuck),
            ("running", u64::from(self.is_running())),
        ]
    }

    fn is_running(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    fn expect(&self, writing: bool) {
        let before = self.shared.expecting.swap(writing, Ordering::AcqRel);
        if writing && !before {
            self.shared.send(Command::Wake);
        }
    }
}

impl Drop for Nixl {
    fn drop(&mut self) {
        self.shared.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the nixl thread panicked");
        }
    }
}

impl Shared {
    /// Sends a command without a permit. Few objects send commands without a permit, so these commands cannot
    /// fill the memory.
    fn send(&self, command: Command) {
        // The send fails if the thread has ended. No caller waits for an answer to a command without a permit.
        drop(self.commands.send(command));
    }

    /// Waits for room in the queue, sends a command and waits for the answer; `None` if the thread has ended.
    ///
    /// # Cancel safety
    /// If the future is dropped while it waits for room, nothing was sent.
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>, OwnedSemaphorePermit) -> Command,
    ) -> Option<T> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok()?;
        self.put(command, permit)?.await.ok()
    }

    /// Queues a command and returns the channel of its answer; `None` if the thread has ended.
    fn put<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>, OwnedSemaphorePermit) -> Command,
        permit: OwnedSemaphorePermit,
    ) -> Option<oneshot::Receiver<T>> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply, permit)).ok()?;
        Some(answer)
    }
}

/// The reason why NIXL could not be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// The kernel did not start the thread.
    #[error("cannot start the nixl thread")]
    Thread(#[source] std::io::Error),
    /// The library or the GPU driver refused.
    #[error("cannot start nixl")]
    Nixl(#[source] Refusal),
    /// The engine thread panicked; its message is on standard error.
    #[error("the nixl thread panicked while starting")]
    Panicked,
}

/// A refusal of the library or of the GPU driver.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    /// The library refused.
    #[error(transparent)]
    Nixl(#[from] ::nixl::Error),
    /// The GPU driver refused.
    #[error(transparent)]
    Cuda(#[from] CudaError),
}

/// Maximum number of writes that wait for the engine thread or are in flight there. Each write is one lease's
/// batch of chunks, so the sender machine has far fewer writes in flight.
const QUEUE: usize = 1024;

#[cfg(test)]
mod bench;
#[cfg(test)]
mod tests;
