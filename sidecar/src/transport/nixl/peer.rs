//! Handles the writes to one receiver: queues, posts, polls and abandons them.

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ::nixl::{Agent, Memory, Merge, RemoteList, Row, State, Transfer};
use protocol::sender::Piece;
use protocol::{SlotIndex, dlist};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shared;
use super::command::{answer, unsent};
use super::counts::Counters;
use super::descriptor_layout::{Batch, Slots};
use super::wire::Wire;
use crate::transport::{Outcome, Readiness, Ready, Remote};

/// A connected receiver.
#[derive(Debug)]
pub(super) struct Peer {
    writes: VecDeque<Write>,
    remote: Rc<RemoteList>,
    slots: Slots,
    remote_slots: u32,
    wire: Wire,
    name: String,
    /// True once the link was dropped. The peer is removed when its writes have ended.
    closed: bool,
    /// The error of the first write that failed or made no progress; `None` before such an error. After an
    /// error, nothing more is posted.
    failed: Option<String>,
    /// The last time at which a batch ended.
    moved: Instant,
    /// Transfers that have ended. The transfers are released after the callers were answered, so that the
    /// release delays no answer.
    ended: Vec<Transfer>,
    shared: Arc<Shared>,
}

/// One call of `Link::write_when`.
#[derive(Debug)]
struct Write {
    /// The readiness of the write's bytes; nothing is posted before they are ready.
    ready: Ready,
    queued: Instant,
    /// The batches that were not posted yet.
    waiting: VecDeque<Batch>,
    bytes: u64,
    running: Vec<Running>,
    /// The first error of the write; `None` while no part has failed.
    failure: Option<Failure>,
    reply: oneshot::Sender<Outcome>,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Running {
    transfer: Transfer,
    posted: Instant,
}

#[derive(Debug)]
struct Failure {
    terminal: bool,
    error: String,
}

impl Peer {
    /// Connects to a receiver. First checks that the receiver's slots have the same size as this side's slots.
    ///
    /// # Errors
    /// The text says what does not fit, or what NIXL refuses.
    pub(super) fn connect(
        agent: &Agent,
        slots: Slots,
        remote: &Remote,
        wire: Wire,
        shared: Arc<Shared>,
    ) -> Result<Self, String> {
        if remote.fields.metadata.is_empty() {
            return Err("the peer has no nixl".to_owned());
        }
        // With slots of another size, this side's descriptors could reach beyond the peer's slots, so both
        // sides must have the same slot size.
        let layout = slots.layout;
        if let Some(row) = remote
            .fields
            .rows
            .iter()
            .find(|row| row.bytes != layout.slot_bytes)
        {
            return Err(format!(
                "the receiver's slots have {} bytes, the slots here {}: both sides must serve the same model",
                row.bytes, layout.slot_bytes
            ));
        }
        let remote_slots = u32::try_from(remote.fields.rows.len())
            .ok()
            .filter(|slots| *slots == remote.slots)
            .ok_or_else(|| {
                format!(
                    "the receiver names {} slots and describes {}",
                    remote.slots,
                    remote.fields.rows.len()
                )
            })?;
        // The descriptors of both sides must have the same order, because a write names them by their
        // indices.
        let rows: Vec<Row> = remote
            .fields
            .rows
            .iter()
            .flat_map(|row| {
                layout.of_slot().map(|(offset, bytes)| Row {
                    // The addition wraps, because the peer's address may be wrong. NIXL refuses every address
                    // that the peer has not registered.
                    address: row.address.wrapping_add(offset),
                    bytes,
                    device: row.device,
                })
            })
            .collect();
        let kind = match remote.memory {
            dlist::Memory::Dram => Memory::Dram,
            dlist::Memory::Vram => Memory::Vram,
        };
        let list = agent
            .load(&remote.fields.metadata)
            .and_then(|loaded| loaded.prepare(kind, &rows))
            .map_err(|error| error.to_string())?;
        Ok(Self {
            writes: VecDeque::new(),
            remote: Rc::new(list),
            slots,
            remote_slots,
            wire,
            name: remote.name.clone(),
            closed: false,
            failed: None,
            moved: Instant::now(),
            ended: Vec::new(),
            shared,
        })
    }

    /// Returns UCX's own estimate of the rate for a whole slot, in GB/s; `None` if UCX gives no estimate.
    pub(super) fn estimate(&self) -> Option<f64> {
        let slot = [Piece {
            from: SlotIndex(0),
            to: SlotIndex(0),
            offset: 0,
            bytes: self.slots.layout.slot_bytes,
        }];
        let batches = self.slots.layout.batches(&slot, 1, u64::MAX).ok()?;
        let [batch] = &batches[..] else { return None };
        let (local, remote) = (&self.slots.list, &self.remote);
        // Neighbours are merged for every kind of wire, because UCX's estimate assumes that descriptors are
        // written one after the other.
        let merge = Merge::Neighbours;
        let time = Transfer::write(local, &batch.from, remote, &batch.to, merge)
            .and_then(|transfer| transfer.estimate())
            .ok()?;
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let bytes = batch.bytes as f64;
        (!time.is_zero()).then(|| bytes / time.as_secs_f64() / 1e9)
    }

    /// Queues a write. If the write cannot be queued, answers at once with the reason.
    pub(super) fn write(
        &mut self,
        ready: Ready,
        pieces: &[Piece],
        slots: Option<&Slots>,
        reply: oneshot::Sender<Outcome>,
        permit: OwnedSemaphorePermit,
    ) {
        if let Some(error) = &self.failed {
            return answer(reply, unsent(format!("the link has failed: {error}")));
        }
        if !slots.is_some_and(|slots| Rc::ptr_eq(&slots.list, &self.slots.list)) {
            return answer(
                reply,
                unsent("the buffer has another slot layout than when the link was made"),
            );
        }
        let batches = self
            .slots
            .layout
            .batches(pieces, self.remote_slots, self.wire.batch_bytes());
        match batches {
            Ok(batches) if batches.is_empty() => answer(reply, Outcome::Done),
            Ok(batches) => self.writes.push_back(Write {
                ready,
                queued: Instant::now(),
                bytes: batches.iter().map(|batch| batch.bytes).sum(),
                waiting: batches.into(),
                running: Vec::new(),
                failure: None,
                reply,
                _permit: permit,
            }),
            Err(piece) => answer(
                reply,
                unsent(format!("{piece:?} is not within both buffers")),
            ),
        }
    }

    /// Polls posted batches and posts a new batch if there is room. Returns true if anything moved.
    pub(super) fn step(
        &mut self,
        stall: Duration,
        busy: Duration,
        stuck: &mut Vec<Transfer>,
    ) -> bool {
        if self.writes.is_empty() {
            return false;
        }
        let mut moved = self.poll(stall, busy, stuck);
        self.look(stall);
        moved |= self.post();
        self.settle();
        self.ended.clear();
        moved
    }

    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    pub(super) fn is_over(&self) -> bool {
        self.closed && self.writes.is_empty()
    }

    pub(super) fn is_active(&self) -> bool {
        !self.writes.is_empty()
    }

    /// Returns true if the library has work for a write of this peer.
    pub(super) fn is_busy(&self) -> bool {
        self.writes.iter().any(|write| !write.is_awaiting())
    }

    /// Returns true if a write waits for its bytes.
    pub(super) fn is_awaiting(&self) -> bool {
        self.writes.iter().any(Write::is_awaiting)
    }

    /// Abandons every write, at the end of the thread.
    pub(super) fn abandon(&mut self, error: &str, stuck: &mut Vec<Transfer>) {
        for write in &mut self.writes {
            if !write.running.is_empty() {
                write.fail(false, error.to_owned());
            }
            stuck.extend(write.running.drain(..).map(|running| running.transfer));
        }
        self.failed.get_or_insert_with(|| error.to_owned());
        self.settle();
    }

    fn poll(&mut self, stall: Duration, busy: Duration, stuck: &mut Vec<Transfer>) -> bool {
        let start = Instant::now();
        let mut moved = false;
        for write in &mut self.writes {
            let mut i = 0;
            while let Some(running) = write.running.get_mut(i) {
                let (terminal, error) = match running.transfer.poll() {
                    State::Running => {
                        let since = running.posted.max(self.moved);
                        if start.saturating_duration_since(since) < stall {
                            i += 1;
                            continue;
                        }
                        let error = format!("no byte moved for {stall:?}");
                        tracing::warn!(peer = self.name, error, "gave up a nixl write");
                        let transfer = write.running.swap_remove(i).transfer;
                        // The connection must not be used again, because a new link would queue behind this
                        // transfer.
                        transfer.distrust();
                        stuck.push(transfer);
                        write.fail(false, error.clone());
                        self.failed.get_or_insert(error);
                        moved = true;
                        continue;
                    }
                    State::Done => {
                        moved = true;
                        self.moved = start;
                        self.ended.push(write.running.swap_remove(i).transfer);
                        continue;
                    }
                    State::Failed(error) => (true, error.to_string()),
                    // Another write to this peer failed, and the connection to the peer was closed.
                    State::Lost => (false, "the connection was given up".to_owned()),
                };
                moved = true;
                write.running.swap_remove(i);
                write.fail(terminal, error.clone());
                self.failed.get_or_insert(error);
            }
        }
        moved || start.elapsed() > busy
    }

    /// Checks which writes are ready, and fails the writes that will never be ready.
    fn look(&mut self, stall: Duration) {
        for write in self.writes.iter_mut().filter(|w| !w.waiting.is_empty()) {
            let error = match write.ready.look() {
                Readiness::There => continue,
                Readiness::NotYet if write.queued.elapsed() < stall => continue,
                Readiness::NotYet => format!("not ready within {stall:?}"),
                Readiness::Never(why) => why,
            };
            // No byte of the write was sent, so the link can still be used.
            write.waiting.clear();
            write.ready.forget();
            write.fail(true, error);
        }
    }

    /// Posts at most one batch. If the CPU makes the copies, this call makes them, and commands and other
    /// peers wait meanwhile.
    fn post(&mut self) -> bool {
        let running: usize = self.writes.iter().map(|write| write.running.len()).sum();
        if self.failed.is_some() || running >= WINDOW {
            return false;
        }
        let next = |w: &&mut Write| !w.waiting.is_empty() && !w.is_awaiting();
        let Some(write) = self.writes.iter_mut().find(next) else {
            return false;
        };
        let Some(batch) = write.waiting.pop_front() else {
            return false;
        };
        let made = Transfer::write(
            &self.slots.list,
            &batch.from,
            &self.remote,
            &batch.to,
            self.wire.merge(),
        );
        let mut transfer = match made {
            Ok(transfer) => transfer,
            Err(error) => {
                // No byte of this batch was sent.
                write.fail(true, error.to_string());
                self.failed = Some(error.to_string());
                return true;
            }
        };
        match transfer.post() {
            Ok(State::Running) => {
                write.ready.lasts();
                write.running.push(Running {
                    transfer,
                    posted: Instant::now(),
                });
            }
            Ok(_) => {
                self.moved = Instant::now();
                self.ended.push(transfer);
            }
            Err(error) => {
                // A part of the batch may have been sent.
                write.fail(false, error.to_string());
                self.failed = Some(error.to_string());
            }
        }
        true
    }

    /// Answers the writes that have ended. After a failure of the peer, the writes with unposted batches fail,
    /// too.
    fn settle(&mut self) {
        if let Some(error) = &self.failed {
            for write in &mut self.writes {
                if !write.waiting.is_empty() {
                    write.waiting.clear();
                    write.ready.forget();
                    write.fail(true, error.clone());
                }
            }
        }
        let mut at = 0;
        while let Some(write) = self.writes.get(at) {
            if write.waiting.is_empty() && write.running.is_empty() {
                if let Some(write) = self.writes.remove(at) {
                    write.end(&self.shared.counters);
                }
            } else {
                at += 1;
            }
        }
    }
}

impl Write {
    fn is_awaiting(&self) -> bool {
        self.ready.is_pending()
    }

    /// Notes the failure of a part. The write keeps the first error, and its failure is terminal only if all
    /// failures are terminal.
    fn fail(&mut self, terminal: bool, error: String) {
        match &mut self.failure {
            Some(failure) => failure.terminal &= terminal,
            none => *none = Some(Failure { terminal, error }),
        }
    }

    fn end(self, counters: &Counters) {
        self.ready.end();
        let (counter, outcome) = match self.failure {
            None => {
                counters.bytes.fetch_add(self.bytes, Ordering::Relaxed);
                (&counters.done, Outcome::Done)
            }
            Some(Failure { terminal, error }) => {
                let counter = if terminal {
                    &counters.failed
                } else {
                    &counters.uncertain
                };
                (counter, Outcome::Failed { terminal, error })
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        answer(self.reply, outcome);
    }
}

/// Maximum number of requests in flight to a peer. With two requests, the wire still has work until the
/// thread notices that a request has ended.
const WINDOW: usize = 2;
