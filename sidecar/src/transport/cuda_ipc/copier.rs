//! Runs the thread that queues copies and polls for their end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

use protocol::sender::Piece;
use tokio::sync::oneshot;

use super::command::{Command, Mapping};
use super::peer::{Peer, leak};
use super::{Config, Shared};
use crate::memory::cuda::{DeviceMemory, Event, State, Strided};
use crate::transport::readiness::{LOOK, sleep_exactly};
use crate::transport::{Outcome, Readiness, Ready};

/// The state that only the thread uses.
#[derive(Debug)]
pub(super) struct Copier {
    /// Writes that have just come, or that wait for their bytes.
    waiting: VecDeque<Waiting>,
    running: Vec<Running>,
    memory: Arc<DeviceMemory>,
    config: Config,
    shared: Arc<Shared>,
    commands: Receiver<Command>,
}

#[derive(Debug)]
struct Waiting {
    peer: Arc<Peer>,
    ready: Ready,
    pieces: Vec<Piece>,
    since: Instant,
    reply: oneshot::Sender<Outcome>,
}

/// The copies of one write that are queued on the GPU.
#[derive(Debug)]
struct Running {
    peer: Arc<Peer>,
    end: Event,
    since: Instant,
    bytes: u64,
    ready: Ready,
    /// The channel that answers the caller; `None` once the caller was told that the outcome is uncertain.
    reply: Option<oneshot::Sender<Outcome>>,
}

impl Copier {
    pub(super) fn new(
        memory: Arc<DeviceMemory>,
        config: Config,
        shared: Arc<Shared>,
        commands: Receiver<Command>,
    ) -> Self {
        Self {
            waiting: VecDeque::new(),
            running: Vec::new(),
            memory,
            config,
            shared,
            commands,
        }
    }

    /// Runs the thread until a stop command comes.
    pub(super) fn run(mut self) {
        sleep_exactly();
        loop {
            let command = match self.pause() {
                Pause::None => self.commands.try_recv().map_err(|error| match error {
                    TryRecvError::Empty => RecvTimeoutError::Timeout,
                    TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                }),
                Pause::For(time) => self.commands.recv_timeout(time),
                Pause::UntilCalled => self
                    .commands
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
            };
            match command {
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return self.finish(),
                Ok(command) => self.obey(command),
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.look();
            self.poll();
        }
    }

    /// Returns the time until the next check is due.
    fn pause(&self) -> Pause {
        let newest = self.running.iter().filter(|r| r.reply.is_some());
        match newest.map(|running| running.since).max() {
            // A push takes about 2 ms, so another thread may use the core meanwhile.
            Some(since) if since.elapsed() < SPIN => {
                std::thread::yield_now();
                Pause::None
            }
            Some(_) => Pause::For(LOOK),
            None if !self.waiting.is_empty() => Pause::For(LOOK),
            None if !self.running.is_empty() => Pause::For(STUCK_LOOK),
            None => Pause::UntilCalled,
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Link {
                remote,
                slot_bytes,
                reply,
            } => {
                let made = Peer::open(&self.memory, slot_bytes, &remote).map(|peer| Mapping {
                    shared: Arc::clone(&self.shared),
                    peer: Arc::new(peer),
                });
                // If the caller no longer waits, the unsent reply is dropped, which unlinks the peer.
                drop(reply.send(made));
            }
            Command::Write {
                peer,
                ready,
                pieces,
                reply,
            } => self.waiting.push_back(Waiting {
                peer,
                ready,
                pieces,
                since: Instant::now(),
                reply,
            }),
            // Copies that still run have their own reference to the peer.
            Command::Unlink(peer) => drop(peer),
            Command::Stop => {}
        }
    }

    /// Queues the writes that are ready, and fails the writes that will never be ready.
    fn look(&mut self) {
        let mut at = 0;
        while let Some(write) = self.waiting.get_mut(at) {
            let error = match write.ready.look() {
                Readiness::There => None,
                Readiness::NotYet if write.since.elapsed() < self.config.stall => {
                    at += 1;
                    continue;
                }
                Readiness::NotYet => Some(format!("not ready within {:?}", self.config.stall)),
                Readiness::Never(why) => Some(why),
            };
            let Some(write) = self.waiting.remove(at) else {
                continue;
            };
            match error {
                None => self.post(write),
                Some(error) => {
                    count(&self.shared.counters.unready, 1);
                    self.fail(write.reply, true, error);
                }
            }
        }
    }

    fn post(&mut self, write: Waiting) {
        let copies = match write.peer.plan(&self.memory, &write.pieces) {
            Ok(copies) if copies.is_empty() => return answer(write.reply, Outcome::Done),
            Ok(copies) => copies,
            Err(error) => return self.fail(write.reply, true, error),
        };
        match write.peer.post(&self.memory, &copies) {
            Ok(end) => {
                count(&self.shared.counters.copies, copies.len() as u64);
                self.running.push(Running {
                    peer: write.peer,
                    end,
                    since: Instant::now(),
                    bytes: copies.iter().map(Strided::bytes).sum(),
                    ready: write.ready,
                    reply: Some(write.reply),
                });
            }
            Err((queued, error)) => {
                let error = format!("copy {queued} of {} failed: {error}", copies.len());
                self.fail(write.reply, queued == 0, error);
                if queued > 0 {
                    // No event tells when the queued copies end, so the buffer must stay mapped until the
                    // process ends.
                    leak(write.peer);
                }
            }
        }
    }

    /// Answers the writes that have ended, and answers writes without progress with an uncertain outcome.
    fn poll(&mut self) {
        let mut at = 0;
        while let Some(running) = self.running.get_mut(at) {
            let (outcome, over) = match running.end.state() {
                Ok(State::Fired) => (Outcome::Done, true),
                Ok(State::Pending) if running.since.elapsed() < self.config.stall => {
                    at += 1;
                    continue;
                }
                Ok(State::Pending) => {
                    let error = format!("no byte moved for {:?}", self.config.stall);
                    (uncertain(error), false)
                }
                // The context is lost, and every later copy fails in the same way.
                Err(error) => (uncertain(error.to_string()), true),
            };
            if let Some(reply) = running.reply.take() {
                running.ready.end();
                let counters = &self.shared.counters;
                match &outcome {
                    Outcome::Done => {
                        count(&counters.done, 1);
                        count(&counters.bytes, running.bytes);
                    }
                    Outcome::Failed { error, .. } => {
                        tracing::warn!(peer = running.peer.name, error, "gave up a copy");
                        count(&counters.uncertain, 1);
                    }
                }
                answer(reply, outcome);
            }
            if over {
                self.running.swap_remove(at);
            } else {
                at += 1;
            }
        }
    }

    fn fail(&self, reply: oneshot::Sender<Outcome>, terminal: bool, error: String) {
        let counters = &self.shared.counters;
        let counter = if terminal {
            &counters.failed
        } else {
            &counters.uncertain
        };
        count(counter, 1);
        answer(reply, Outcome::Failed { terminal, error });
    }

    /// Waits for copies in flight, for a limited time, and then answers all writes that are left.
    fn finish(mut self) {
        for write in std::mem::take(&mut self.waiting) {
            self.fail(write.reply, true, "the transport has stopped".to_owned());
        }
        let deadline = Instant::now() + self.config.drain;
        while !self.running.is_empty() && Instant::now() < deadline {
            self.poll();
            std::thread::sleep(LOOK);
        }
        for running in self.running {
            if let Some(reply) = running.reply {
                answer(reply, uncertain("the transport has stopped".to_owned()));
            }
            tracing::warn!(
                peer = running.peer.name,
                "a copy has not ended: this process keeps both buffers until it ends"
            );
            leak(running.peer);
            std::mem::forget(Arc::clone(&self.memory));
        }
    }
}

enum Pause {
    None,
    For(Duration),
    UntilCalled,
}

fn uncertain(error: String) -> Outcome {
    let terminal = false;
    Outcome::Failed { terminal, error }
}

/// Answers a caller, which may no longer wait.
fn answer(reply: oneshot::Sender<Outcome>, outcome: Outcome) {
    drop(reply.send(outcome));
}

fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// After a write, the thread polls for this time without sleeping: the push of a long prompt ends within
/// this time.
const SPIN: Duration = Duration::from_millis(4);
/// The time between two checks of abandoned copies, which may end at any time or never.
const STUCK_LOOK: Duration = Duration::from_millis(100);
