//! Sends to LMCache's receivers. The sender asks for slots only for complete chunks, and sends one
//! alloc request at a time.
//!
//! An LMCache receiver shows a key as soon as it has given a slot to the key, even if the KV is not written
//! yet. So the sender reverses its usual order: a chunk first gets a send slot, and the engine gathers the
//! chunk into this slot. Then the sender asks for a slot for the chunk's key, and posts the write when the
//! answer comes. So the receiver can show a key without KV only if the write fails.
//!
//! ```text
//!  Waiting ──slot──▶ Filling ──Staged──▶ Full ──question──▶ Asked ──slot──▶ Posted ──▶ Acked
//!                       └─Staged, event─▶ Gathering ─fired─▲  └──known already──▶ Skipped
//! ```
//!
//! * A chunk is not complete before the GPU has finished the gather. If the sender asked for a slot
//!   earlier and the engine died before the event fired, the receiver would show a key whose KV is
//!   never written.
//! * Answers have no number, so each connection has at most one alloc request in flight. A late answer belongs to this
//!   alloc request, even if the request was cancelled in the meantime.
//! * The asynchronous receiver (its socket is a ROUTER) frees keys on `CancelNotif`. The
//!   synchronous receiver (its socket is a REP) stops answering after a `CancelNotif`, so the
//!   sender never sends a `CancelNotif` to such a receiver. The sender never gives back keys of
//!   writes with an unknown end: another request would get their slots while the write may still
//!   arrive.
//! * The receiver does not tell which tokens the decode side already has, and it grants no slots
//!   later (no window). An answer with −1 ends the request with `no_room`.
//! * LMCache knows no groups of layers, so the sender refuses its receivers if the layout has groups.

use std::collections::{BTreeSet, VecDeque};

use super::request::{Chunk, Feeding, Phase};
use super::{Action, Link, PATIENCE, Piece, Sender, WatchId};
use crate::keys::is_tagged;
use crate::local::{Granted, Target};
use crate::message::{AllocRequest, AllocResponse, CancelNotif, ToReceiver};
use crate::{LeaseId, Reason, RequestId, SlotIndex, Time, TransferId};

/// A link to an LMCache receiver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Foreign {
    /// Number of the receiver's slots.
    pub(super) slots: u32,
    pub(super) transport: String,
    /// True if the receiver frees keys on `CancelNotif`.
    pub(super) cancels: bool,
    /// Message that waits for its answer. Absent: no message waits.
    question: Option<Question>,
    /// Keys that the sender still has to give back, by request.
    returns: VecDeque<(RequestId, Vec<String>)>,
}

/// Message to which the next answer belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Question {
    Alloc {
        req: RequestId,
        chunks: Vec<u32>,
        keys: Vec<String>,
    },
    Cancel,
}

impl Foreign {
    pub(super) fn new(slots: u32, transport: String, cancels: bool) -> Self {
        Self {
            slots,
            transport,
            cancels,
            question: None,
            returns: VecDeque::new(),
        }
    }
}

impl Sender {
    /// Starts a request after the handshake: the engine may get send slots. Ends a request with
    /// tags in its keys: LMCache's decode side looks only for keys without tags, so the receiver
    /// would keep KV that nobody reads.
    pub(super) fn feed(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if request.keys.iter().any(|key| is_tagged(key)) {
            return self.end(id, Reason::KeyMismatch);
        }
        if !self.config.layout.groups.is_empty() {
            return self.end(id, Reason::LayoutMismatch);
        }
        if let Some(Link::Lmcache(link)) = self.links.get(&request.to) {
            request.record.transport.clone_from(&link.transport);
        }
        request.phase = Phase::Feeding(Feeding::default());
        request.progress = self.now;
        let Some(engine) = request.engine else {
            return;
        };
        let granted = Granted::nothing(id.clone(), 0);
        self.actions.push_back(Action::Granted(engine, granted));
    }

    /// Acts on the end of a watch: the watched chunks are complete, or will never be complete.
    pub(super) fn on_watched(&mut self, watch: WatchId, stand: bool) {
        let of = |c: &Chunk| matches!(c, Chunk::Gathering { watch: w, .. } if *w == watch);
        let mut requests = self.requests.iter_mut();
        let Some((id, request)) = requests.find(|(_, r)| r.chunks.iter().any(of)) else {
            return; // the request has ended in the meantime
        };
        let id = id.clone();
        if !stand {
            return self.end(&id, Reason::TransferFailed);
        }
        for chunk in &mut request.chunks {
            match *chunk {
                Chunk::Gathering { from, watch: w } if w == watch => *chunk = Chunk::Full { from },
                _ => {}
            }
        }
        request.progress = self.now;
        self.on_full(&id);
    }

    /// Asks for slots for the complete chunks of a request.
    pub(super) fn on_full(&mut self, id: &RequestId) {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if let Phase::Feeding(feeding) = &mut request.phase {
            feeding.waits.get_or_insert(now);
        }
        let to = request.to.clone();
        self.ask_lmcache(&to);
    }

    /// Sends the next message to an LMCache receiver, if the receiver has answered the last
    /// message.
    pub(super) fn ask_lmcache(&mut self, to: &Target) {
        let Some(Link::Lmcache(link)) = self.links.get_mut(to) else {
            return;
        };
        if link.question.is_some() {
            return;
        }
        if let Some((req, keys)) = link.returns.pop_front() {
            link.question = Some(Question::Cancel);
            let cancel = CancelNotif {
                req_id: req.0,
                keys,
                x: None,
            };
            return self.send(to, ToReceiver::CancelNotif(cancel));
        }
        let ready = |r: &super::Request| {
            r.to == *to && r.chunks.iter().any(|c| matches!(c, Chunk::Full { .. }))
        };
        let next = self.requests.iter().filter(|(_, r)| ready(r));
        let Some(id) = next.min_by_key(|(_, r)| r.order).map(|(id, _)| id.clone()) else {
            return;
        };
        let message = self.batch(&id);
        self.send(to, ToReceiver::AllocRequest(message));
    }

    /// Returns the alloc request for all complete chunks of a request.
    fn batch(&mut self, id: &RequestId) -> AllocRequest {
        let layout = self.config.layout.clone();
        let full = layout.chunk_tokens;
        let mut chunks = Vec::new();
        let mut keys = Vec::new();
        let mut last_chunk_toks = full;
        let (mut total, mut more) = (0, false);
        let mut link = None;
        if let Some(request) = self.requests.get_mut(id) {
            total = u32::try_from(request.keys.len()).unwrap_or(u32::MAX);
            let plan = request.plan(&self.chunking);
            for (index, chunk) in (0u32..).zip(&mut request.chunks) {
                if let Chunk::Full { from: slot } = *chunk {
                    *chunk = Chunk::Asked { from: slot };
                    chunks.push(index);
                    keys.push(request.keys[index as usize].clone());
                    last_chunk_toks = plan.needs(index) - index * full;
                } else {
                    more |= matches!(
                        chunk,
                        Chunk::Waiting | Chunk::Filling { .. } | Chunk::Gathering { .. }
                    );
                }
            }
            link = Some(request.to.clone());
        }
        let first = if keys.len() == 1 {
            last_chunk_toks
        } else {
            full
        };
        if let Some(Link::Lmcache(link)) = link.and_then(|to| self.links.get_mut(&to)) {
            link.question = Some(Question::Alloc {
                req: id.clone(),
                chunks,
                keys: keys.clone(),
            });
        }
        AllocRequest {
            keys,
            fmt: layout.format(),
            shape: layout.shape(first),
            dtype: layout.dtype,
            last_chunk_toks,
            req_id: id.0.clone(),
            is_last_batch: !more,
            total_chunks: total,
            x: None,
        }
    }

    /// Handles an answer of an LMCache receiver.
    pub(super) fn on_lmcache_response(&mut self, to: &Target, response: &AllocResponse) {
        let Some(Link::Lmcache(link)) = self.links.get_mut(to) else {
            return;
        };
        let slots = link.slots;
        if let Some(Question::Alloc { req, chunks, keys }) = link.question.take() {
            let wanted = self.requests.get(&req).is_some_and(|r| {
                let asked =
                    |&i: &u32| matches!(r.chunks.get(i as usize), Some(Chunk::Asked { .. }));
                matches!(&r.phase, Phase::Feeding(f) if !f.over) && chunks.iter().any(asked)
            });
            match places(&chunks, response, slots) {
                Some(places) if wanted => self.on_places(&req, &places),
                Some(places) => {
                    // The request has ended, so no write will follow. The receiver must not show
                    // the keys of slots that are never written.
                    let given = places.iter().filter(|(_, slot)| slot.is_some());
                    let given: Vec<String> = given
                        .filter_map(|(chunk, _)| chunks.iter().position(|c| c == chunk))
                        .map(|at| keys[at].clone())
                        .collect();
                    self.give_back(to, &req, given);
                }
                None if wanted => self.end(&req, Reason::NoRoom),
                None => {}
            }
        }
        self.ask_lmcache(to);
    }

    /// Posts one write for all chunks that have got a slot.
    fn on_places(&mut self, id: &RequestId, places: &[(u32, Option<SlotIndex>)]) {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        // Only the first answer counts for `alloc_us`, because later batches wait for the engine
        // and not for the receiver.
        if request.record.alloc_us == 0 {
            request.record.alloc_us = now.micros_since(request.since);
        }
        let transfer = TransferId(self.next_transfer);
        let plan = request.plan(&self.chunking);
        let mut pieces = Vec::new();
        for &(index, slot) in places {
            let Some(chunk) = request.chunks.get_mut(index as usize) else {
                continue;
            };
            let Chunk::Asked { from } = *chunk else {
                continue;
            };
            // The receiver already has this key, so the chunk needs no write.
            let Some(to) = slot else {
                *chunk = Chunk::Skipped;
                self.slots.give(from);
                continue;
            };
            *chunk = Chunk::Posted { from, to, transfer };
            pieces.push(Piece {
                from,
                to,
                offset: 0,
                bytes: plan.size(index),
            });
        }
        request.progress = now;
        let waits = request
            .chunks
            .iter()
            .any(|c| matches!(c, Chunk::Full { .. }));
        if let Phase::Feeding(feeding) = &mut request.phase {
            feeding.known.extend(places.iter().map(|place| place.0));
            feeding.waits = waits.then_some(now);
        }
        // The receiver already had all keys, so there is no write whose end could end the request.
        if pieces.is_empty() {
            return self.finish_fed(id);
        }
        if request.in_flight == 0 {
            request.push_since = now;
        }
        request.in_flight += 1;
        self.next_transfer += 1;
        self.transfers.insert(transfer, id.clone());
        self.actions.push_back(Action::Write {
            to: request.to.clone(),
            transfer,
            lease: NO_LEASE,
            pieces,
            after: None,
            layers: Vec::new(),
        });
    }

    /// Ends a request to an LMCache receiver if nothing is left to do for it.
    pub(super) fn finish_fed(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        for chunk in &mut request.chunks {
            if matches!(chunk, Chunk::Done { .. }) {
                *chunk = Chunk::Acked;
            }
        }
        let Phase::Feeding(feeding) = &request.phase else {
            return;
        };
        if feeding.over {
            self.retire_fed(id);
        } else if request.is_done() {
            self.tell_done(id, None);
            self.forget(id);
        }
    }

    /// Forgets a request that has ended early and gives its keys back, unless a write is in flight.
    pub(super) fn retire_fed(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        let Phase::Feeding(feeding) = &request.phase else {
            return;
        };
        if request.in_flight > 0 {
            return;
        }
        let clean = feeding.known.difference(&feeding.dirty);
        let keys: Vec<String> = clean
            .filter_map(|&i| request.keys.get(i as usize).cloned())
            .collect();
        let to = request.to.clone();
        self.forget(id);
        self.give_back(&to, id, keys);
        self.ask_lmcache(&to);
    }

    /// Queues keys that the receiver has to free. Does nothing for receivers that cannot free keys.
    fn give_back(&mut self, to: &Target, req: &RequestId, keys: Vec<String>) {
        if let Some(Link::Lmcache(link)) = self.links.get_mut(to)
            && link.cancels
            && !keys.is_empty()
            && link.returns.len() < MAX_RETURNS
        {
            link.returns.push_back((req.clone(), keys));
        }
    }

    /// Returns the time at which the sender ends a request whose wait for slots began at the time
    /// `waits`.
    pub(super) fn lmcache_patience(&self, waits: Time) -> Time {
        waits + self.config.wait + self.config.repeat * PATIENCE
    }
}

/// Returns each chunk with its slot, which is `None` if the receiver already has the chunk. Returns
/// `None` for an answer with −1 and for an invalid answer.
fn places(
    chunks: &[u32],
    response: &AllocResponse,
    slots: u32,
) -> Option<Vec<(u32, Option<SlotIndex>)>> {
    let mut indexes = response.remote_indexes.iter();
    let mut places = Vec::with_capacity(chunks.len());
    let mut taken = BTreeSet::new();
    for (position, &chunk) in (0u32..).zip(chunks) {
        if response.already_sent_indexes.contains(&position) {
            places.push((chunk, None));
            continue;
        }
        let slot = u32::try_from(*indexes.next()?).ok()?;
        if slot >= slots || !taken.insert(slot) {
            return None;
        }
        places.push((chunk, Some(SlotIndex(slot))));
    }
    indexes.next().is_none().then_some(places)
}

/// Placeholder for a lease id: LMCache's receivers grant no leases.
const NO_LEASE: LeaseId = LeaseId(0);
/// Maximum number of requests per receiver whose keys the sender still has to give back.
const MAX_RETURNS: usize = 1024;
