//! Runs the thread that owns the NIXL agent.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use ::nixl::{Agent, Library, Memory, Pinned, Registration, State, Transfer};

use super::command::{Command, Connection, answer, unsent};
use super::descriptor_layout::{DescriptorLayout, Slots};
use super::peer::Peer;
use super::poll_backoff::{PollBackoff, Wait};
use super::wire::Wire;
use super::{Config, Refusal, Shared};
use crate::memory::Buffer;
use crate::transport::Remote;
use crate::transport::readiness::{LOOK as READY_LOOK, sleep_exactly};
use crate::transport::ucx::CONSENT;

/// The state that only the thread uses.
#[derive(Debug)]
pub(super) struct Engine {
    peers: HashMap<u64, Peer>,
    /// Writes that were abandoned and have not ended. An abandoned write must not be released before it has
    /// ended.
    stuck: Vec<Transfer>,
    slots: Option<Slots>,
    registration: Rc<Registration>,
    agent: Agent,
    config: Config,
    wire: Wire,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    next_link: u64,
}

impl Engine {
    /// Makes the engine on the thread that will run it, and returns the agent's metadata with it.
    pub(super) fn new(
        library: &'static Library,
        config: Config,
        wire: Wire,
        buffer: Arc<Buffer>,
        shared: Arc<Shared>,
        commands: Receiver<Command>,
    ) -> Result<(Self, Vec<u8>), Refusal> {
        // For its memory, UCX uses the CUDA context that is current on this thread.
        let memory = match buffer.cuda() {
            Some(gpu) => {
                gpu.device().bind()?;
                sleep_exactly();
                Memory::Vram
            }
            None => Memory::Dram,
        };
        let mut ucx = ::nixl::Config::ucx(&config.agent);
        ucx.params.clone_from(&config.params);
        let agent = Agent::new(library, &ucx)?;
        let registration = agent.register(buffer as Arc<dyn Pinned>, memory, config.device)?;
        let metadata = agent.metadata()?;
        let engine = Self {
            peers: HashMap::new(),
            stuck: Vec::new(),
            slots: None,
            registration: Rc::new(registration),
            agent,
            config,
            wire,
            shared,
            commands,
            next_link: 0,
        };
        Ok((engine, metadata))
    }

    /// Runs the thread until a stop command comes.
    pub(super) fn run(mut self) {
        let mut backoff = PollBackoff::default();
        let mut looked = Instant::now();
        loop {
            let mut moved = false;
            loop {
                match self.commands.try_recv() {
                    Ok(command) => {
                        moved = true;
                        if self.obey(command).is_break() {
                            return self.finish();
                        }
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return self.finish(),
                }
            }
            moved |= self.poll(backoff.busy());
            let now = Instant::now();
            if now.duration_since(looked) >= LOOK {
                looked = now;
                self.look();
            }
            let wait = if moved || self.is_busy() {
                backoff.wait(moved, now)
            } else if self.shared.expecting.load(Ordering::Acquire) {
                backoff.expect(now)
            } else {
                Wait::Sleep(LOOK)
            };
            let awaiting = self.peers.values().any(Peer::is_awaiting);
            let wait = match wait {
                Wait::Sleep(time) if awaiting => Wait::Sleep(time.min(READY_LOOK)),
                wait => wait,
            };
            match wait {
                Wait::Spin => std::hint::spin_loop(),
                Wait::Yield => std::thread::yield_now(),
                // A command ends the sleep.
                Wait::Sleep(time) => match self.commands.recv_timeout(time) {
                    Ok(command) => {
                        if self.obey(command).is_break() {
                            return self.finish();
                        }
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return self.finish(),
                },
            }
        }
    }

    fn obey(&mut self, command: Command) -> ControlFlow<()> {
        match command {
            Command::Divide { slots, slot_bytes } => self.divide(slots, slot_bytes),
            Command::Link { remote, reply, .. } => {
                let link = self.link(&remote);
                // If the caller no longer waits, the unsent reply is dropped, which unlinks the peer.
                drop(reply.send(link));
            }
            Command::Write {
                link,
                ready,
                pieces,
                reply,
                permit,
            } => match self.peers.get_mut(&link) {
                Some(peer) => peer.write(ready, &pieces, self.slots.as_ref(), reply, permit),
                // A link without a peer is possible only while the thread ends.
                None => answer(reply, unsent("the link has ended")),
            },
            Command::Unlink(link) => {
                if let Some(peer) = self.peers.get_mut(&link) {
                    peer.close();
                }
            }
            Command::Wake => {}
            Command::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    fn divide(&mut self, slots: u32, slot_bytes: u64) {
        self.slots = None;
        let Some(layout) = DescriptorLayout::new(slots, slot_bytes, self.wire) else {
            tracing::error!(slots, slot_bytes, "nixl cannot address slots of this shape");
            return;
        };
        match self.registration.prepare(&layout.ranges()) {
            Ok(list) => {
                self.slots = Some(Slots {
                    layout,
                    list: Rc::new(list),
                });
            }
            Err(error) => {
                tracing::error!(slots, slot_bytes, %error, "nixl cannot prepare the slots")
            }
        }
    }

    fn link(&mut self, remote: &Remote) -> Result<Connection, String> {
        let slots = self.slots.as_ref().ok_or("no engine has connected yet")?;
        let peer = Peer::connect(
            &self.agent,
            slots.clone(),
            remote,
            self.wire,
            Arc::clone(&self.shared),
        )
        .map_err(|error| {
            if self.shared.over_tcp {
                error
            } else {
                format!("{error}; LMCache's agents connect over UCX's TCP only: {CONSENT}")
            }
        })?;
        let granule = slots.layout.descriptor_bytes();
        let id = self.next_link;
        self.next_link += 1;
        let mut reported = format!("UCX_TLS={}", self.shared.ucx_tls);
        if let Some(rate) = peer.estimate() {
            reported += &format!(", estimate of UCX {rate:.2} GB/s");
        }
        self.peers.insert(id, peer);
        self.count();
        Ok(Connection {
            shared: Arc::clone(&self.shared),
            id,
            granule,
            reported,
        })
    }

    /// Polls every peer. Returns true if anything moved.
    fn poll(&mut self, busy: Duration) -> bool {
        let mut moved = false;
        for peer in self.peers.values_mut() {
            moved |= peer.step(self.config.stall, busy, &mut self.stuck);
        }
        let before = self.peers.len();
        self.peers.retain(|_, peer| !peer.is_over());
        if self.peers.len() != before {
            self.count();
        }
        if self.shared.expecting.load(Ordering::Acquire) {
            moved |= self.progress() > busy;
        }
        moved
    }

    /// Does the work that is due ten times a second, even when no write is in flight: answers peers that
    /// connect, and polls abandoned writes.
    fn look(&mut self) {
        self.progress();
        self.stuck.retain_mut(|transfer| match transfer.poll() {
            State::Running => true,
            ended => {
                tracing::info!(?transfer, ?ended, "a write that was given up has ended");
                false
            }
        });
        self.count();
    }

    fn count(&self) {
        let counters = &self.shared.counters;
        counters
            .peers
            .store(self.peers.len() as u64, Ordering::Relaxed);
        counters
            .stuck
            .store(self.stuck.len() as u64, Ordering::Relaxed);
    }

    /// Lets the library make progress. Returns the duration of the call.
    fn progress(&self) -> Duration {
        let start = Instant::now();
        if let Err(error) = self.agent.progress() {
            tracing::warn!(%error, "nixl's progress call failed");
        }
        start.elapsed()
    }

    /// Returns true if the library has work for one of this process's writes.
    fn is_busy(&self) -> bool {
        self.peers.values().any(Peer::is_busy)
    }

    fn writes_wait(&self) -> bool {
        self.peers.values().any(Peer::is_active)
    }

    /// Waits for writes in flight, for a limited time, and then answers all writes that are left.
    fn finish(mut self) {
        let mut backoff = PollBackoff::default();
        let deadline = Instant::now() + self.config.drain;
        while self.writes_wait() && Instant::now() < deadline {
            match backoff.wait(self.poll(backoff.busy()), Instant::now()) {
                Wait::Spin => std::hint::spin_loop(),
                Wait::Yield => std::thread::yield_now(),
                Wait::Sleep(time) => std::thread::sleep(time),
            }
        }
        for peer in self.peers.values_mut() {
            peer.abandon("the transport has stopped", &mut self.stuck);
        }
        // The queued commands are dropped with their reply channels, so that the callers learn that the
        // thread has ended. Transfers that still run keep the buffer registered and mapped until the
        // process ends; see `nixl::Transfer`.
        if !self.stuck.is_empty() {
            tracing::warn!(
                writes = self.stuck.len(),
                "nixl writes have not ended: this process keeps the buffer until it ends"
            );
        }
    }
}

/// The time between two calls of [`Engine::look`]. A peer's connection request waits at most this long. Ten
/// calls per second, of a few microseconds each, cost almost nothing.
const LOOK: Duration = Duration::from_millis(100);
