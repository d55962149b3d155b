//! Copies directly into the receiver's GPU memory, which is mapped by an IPC handle. This wire serves two
//! sidecars on one host with GPUs that reach each other.
//!
//! Each buffer has one thread. The thread queues copies on one stream per receiver, and polls for the end of
//! the copies; the GPU's copy engines do the work. [`Ready`](super::Ready) describes the event that the
//! thread waits for before it queues a copy, and why the GPU does not wait. An event is recorded after a
//! write's copies. When this event has fired, the copies have ended, and every byte is visible to all work
//! that the receiver's GPU begins later. So if a sender reports that its write has ended, no write to the
//! slot is in flight. If the sender reports nothing, the end of the sender's process is the proof, because
//! the process's queued copies end with it.
//!
//! docs/benchmarks.md, "The wire", compares the rate with the other wires.
//!
//! | file | |
//! |---|---|
//! | [`address`] | the address of a receiver's buffer |
//! | [`command`] | the requests to the thread |
//! | [`copier`] | the thread |
//! | [`peer`] | one receiver: its memory, its stream, and how pieces become copies |
//! | [`link`] | the sending half of the trait |

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use futures::future::BoxFuture;
use protocol::message::Advert;
use protocol::{LeaseId, SlotIndex};

use super::expected_rate::ExpectedRate;
use super::spec::{Spec, Start};
use super::{Kind, Link, LinkError, Remote, Transport};
use crate::memory::cuda::{self, DeviceMemory};

mod address;
mod command;
mod copier;
mod link;
mod peer;

use address::Address;
use command::Command;
use copier::Copier;

/// Copies into GPU memory of another process on the same host.
pub(crate) const KIND: Kind = Kind(&Spec {
    name: "cuda_ipc",
    library: Some(library),
    needs_gpu: true,
    uses_ucx: false,
    protects_data: false,
    lmcache_has_it: false,
    absence: None,
    start,
    address: |offer, _| Ok(Some(offer.address.clone())),
    expected_rate: |_| ExpectedRate {
        least_gb_s: 5.0,
        hint: "the GPUs share no NVLink and a slow or busy bus; `nvidia-smi topo -m` shows how they are \
               linked",
    },
});

fn library() -> Result<String, String> {
    let gpus = cuda::all().map_err(|error| error.to_string())?;
    Ok(format!("the CUDA driver, with {} GPUs", gpus.len()))
}

fn start(with: &Start<'_>) -> anyhow::Result<Arc<dyn Transport>> {
    let memory = with.buffer.cuda();
    let memory = memory.ok_or_else(|| anyhow::anyhow!("the buffer is not on a GPU"))?;
    let config = Config {
        link: with.link,
        stall: with.stall,
        drain: DRAIN,
    };
    let started = CudaIpc::start(Arc::clone(memory), config)
        .map_err(|e| anyhow::anyhow!("no thread for copies between GPUs: {e}"))?;
    Ok(Arc::new(started))
}

/// Time limit for copies in flight when the process ends. Normally these copies end within milliseconds.
const DRAIN: Duration = Duration::from_secs(2);

/// The time limits of the transport.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config {
    /// Time limit for making a link.
    pub(crate) link: Duration,
    /// A write fails if it waits for its bytes for this time, or makes no progress for this time.
    pub(crate) stall: Duration,
    /// Time limit for copies in flight when the transport stops.
    pub(crate) drain: Duration,
}

/// Both halves of the transport over one buffer.
///
/// When the transport is dropped, it waits for the thread, at most for [`Config::drain`].
#[derive(Debug)]
pub(crate) struct CudaIpc {
    memory: Arc<DeviceMemory>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// The state that the thread and its clients share.
#[derive(Debug)]
struct Shared {
    commands: mpsc::Sender<Command>,
    /// Bytes of a slot of this buffer; 0 before the first slot layout.
    slot_bytes: AtomicU64,
    link: Duration,
    counters: Counters,
}

/// The event counts, which the copying thread writes and any thread reads.
#[derive(Debug, Default)]
struct Counters {
    done: AtomicU64,
    failed: AtomicU64,
    uncertain: AtomicU64,
    unready: AtomicU64,
    bytes: AtomicU64,
    copies: AtomicU64,
}

impl CudaIpc {
    /// Starts the copying thread.
    ///
    /// # Errors
    /// The kernel's refusal to start a thread.
    pub(crate) fn start(memory: Arc<DeviceMemory>, config: Config) -> std::io::Result<Self> {
        let (commands, queue) = mpsc::channel();
        let shared = Arc::new(Shared {
            commands,
            slot_bytes: AtomicU64::new(0),
            link: config.link,
            counters: Counters::default(),
        });
        let copier = Copier::new(Arc::clone(&memory), config, Arc::clone(&shared), queue);
        let thread = thread::Builder::new()
            .name(format!("cuda-{}", memory.device().ordinal()))
            .spawn(move || copier.run())?;
        Ok(Self {
            memory,
            shared,
            thread: Some(thread),
        })
    }
}

impl Transport for CudaIpc {
    fn kind(&self) -> Kind {
        KIND
    }

    fn advert(&self) -> Advert {
        Advert {
            kind: KIND.as_str().to_owned(),
            address: Address::of(&self.memory).to_string(),
        }
    }

    fn reaches(&self, advert: &Advert, same_host: bool) -> Result<(), String> {
        if !same_host {
            return Err("the receiver is on another host, or in another PID namespace".to_owned());
        }
        let address: Address = advert.address.parse()?;
        self.memory.device().reaches(&address.uuid)
    }

    fn divide(&self, _slots: u32, slot_bytes: u64) {
        self.shared.slot_bytes.store(slot_bytes, Ordering::Release);
    }

    fn link(&self, remote: Remote) -> BoxFuture<'static, Result<Arc<dyn Link>, LinkError>> {
        Box::pin(link::connect(Arc::clone(&self.shared), remote))
    }

    fn open(&self, _lease: LeaseId, _owner: Option<&Arc<str>>, _slot: SlotIndex) {
        // Copies are one-sided: this process cannot stop a peer from writing. Peers respect the leases,
        // because they follow the protocol.
    }

    fn close(&self, _slot: SlotIndex) {}

    fn close_is_a_fence(&self) -> bool {
        false
    }

    fn events(&self) -> Vec<(&'static str, u64)> {
        let counters = &self.shared.counters;
        // Relaxed order is enough, because the counts are independent: no decision uses two of them.
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("writes_done", read(&counters.done)),
            ("writes_failed", read(&counters.failed)),
            ("writes_uncertain", read(&counters.uncertain)),
            ("writes_never_ready", read(&counters.unready)),
            ("bytes_written", read(&counters.bytes)),
            ("copies", read(&counters.copies)),
            ("running", u64::from(self.is_running())),
        ]
    }

    fn is_running(&self) -> bool {
        self.thread
            .as_ref()
            .is_some_and(|thread| !thread.is_finished())
    }

    fn expect(&self, _writing: bool) {
        // There is nothing to do, because the sender's copy engines write.
    }
}

impl Drop for CudaIpc {
    fn drop(&mut self) {
        // The send fails if the thread has ended already.
        drop(self.shared.commands.send(Command::Stop));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that copies between GPUs panicked");
        }
    }
}

#[cfg(test)]
mod tests;
