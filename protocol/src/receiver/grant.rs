//! Who gets slots, and how an alloc request is answered.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use rand::Rng;

use super::reclaim::Blocked;
use super::request::{Allocation, Chunk, Lease, Pending};
use super::{Action, Receiver, SenderId, bounded};
use crate::layout::{chunk_span, chunks_of};
use crate::message::{AllocResponse, AllocResponseX, More, ToSender};
use crate::receiver::Route;
use crate::{LeaseId, Reason, RequestId, VERSION};

impl Receiver {
    /// Gives free slots to those who wait, until nobody who waits can be served.
    ///
    /// Leases of parked requests come first, a slot each in turn: they hold KV blocks of the engine,
    /// and each needs only one slot to go on. Alloc requests that must have all their slots at once
    /// follow in the order in which they came.
    ///
    /// KV that nobody reads makes room for who waits.
    pub(super) fn serve(&mut self) {
        while let Some(blocked) = self.serve_once() {
            if !self.reclaim(&blocked) {
                return;
            }
        }
    }

    /// Says on whose slots somebody waits, if anybody does.
    fn serve_once(&mut self) -> Option<Blocked> {
        let mut lacks = None;
        let mut grants: BTreeMap<RequestId, Vec<usize>> = BTreeMap::new();
        let mut turn = std::mem::take(&mut self.waiting);
        let mut asks = Vec::new();
        while let Some(id) = turn.pop_front() {
            let Some(request) = self.requests.get_mut(&id) else {
                continue;
            };
            match &mut request.allocation {
                Allocation::None => {}
                Allocation::Pending(_) => asks.push(id),
                Allocation::Leased(lease) => {
                    let Some(index) = lease.waiting().next() else {
                        continue;
                    };
                    let Some(slot) = self.slots.take() else {
                        self.waiting.push_back(id);
                        lacks = Some(Blocked::Room);
                        continue;
                    };
                    lease.chunks[index] = Chunk::Open {
                        slot,
                        writing: false,
                    };
                    self.actions.push_back(Action::Open {
                        lease: lease.id,
                        slot,
                    });
                    grants.entry(id.clone()).or_default().push(index);
                    turn.push_back(id);
                }
            }
        }
        for (id, chunks) in grants {
            self.send_more(&id, &chunks);
        }
        let mut blocked = false;
        let mut exposed = Exposed::default();
        for id in asks {
            match self.try_unparked(&id, blocked, &mut exposed) {
                Admission::Over => {}
                Admission::Waits => self.waiting.push_back(id),
                Admission::Blocks => {
                    lacks.get_or_insert(Blocked::Room);
                    blocked = true;
                    self.waiting.push_back(id);
                }
            }
        }
        let lend = self.lend(blocked, &mut exposed);
        lacks.or(lend)
    }

    /// Decides about an alloc request that has no answer yet.
    pub(super) fn consider(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        let Allocation::Pending(pending) = &request.allocation else {
            return;
        };
        match &request.parked {
            Some(parked)
                if parked.keys != pending.request.keys || parked.tokens != pending.x.tokens =>
            {
                self.refuse_mismatch(id);
            }
            Some(parked) => {
                let have = parked.have_tokens;
                let lease = self.lease_for(id, have);
                if let Some(lease) = lease {
                    self.answer_windowed(id, lease);
                }
            }
            None if pending.park.is_some() => {}
            None if pending.request.keys.len() > self.host_quota(&pending.host) => {
                self.refuse_and_end(id, Reason::TooLarge);
            }
            None => {
                if !self.waiting.contains(id) {
                    self.waiting.push_back(id.clone());
                }
            }
        }
    }

    /// Refuses a question that names other keys than the decode request that waits. It may be anybody's, so the
    /// decode request goes on waiting for its sender, for a moment: mostly the two sides are set up differently.
    fn refuse_mismatch(&mut self, id: &RequestId) {
        let soon = self.now + MISMATCH;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if let Some(parked) = &mut request.parked {
            parked.mismatched = true;
            parked.no_sender = parked.no_sender.min(soon);
        }
        if let Allocation::Pending(pending) =
            std::mem::replace(&mut request.allocation, Allocation::None)
        {
            let (seq, keys) = (pending.x.seq, pending.request.keys.len());
            self.send_refusal(pending.route, seq, keys, Reason::KeyMismatch);
        }
    }

    /// Grants all slots of an unparked request, if they are there and nobody is before it.
    fn try_unparked(&mut self, id: &RequestId, blocked: bool, exposed: &mut Exposed) -> Admission {
        let Some(Allocation::Pending(pending)) = self.requests.get(id).map(|r| &r.allocation)
        else {
            return Admission::Over;
        };
        let (wanted, host) = (pending.request.keys.len(), pending.host.clone());
        if exposed.to(&host, self) + wanted > self.host_quota(&host) {
            return Admission::Waits;
        }
        if blocked || wanted > self.slots.free() as usize {
            return Admission::Blocks;
        }
        if let Some(lease) = self.lease_for(id, 0) {
            self.answer_windowed(id, lease);
            exposed.add(&host, wanted);
        }
        Admission::Over
    }

    /// Slots that one host may have without any decode request that waits for them: not all. Whoever
    /// reaches the port can ask, under any name, and leave what it got for ever in quarantine.
    pub(super) fn host_quota(&self, host: &str) -> usize {
        let total = self.slots.total();
        let kept = if host.is_empty() { 0 } else { total / KEPT };
        (total - kept) as usize
    }

    /// Slots that a host has now, or has left quarantined, and that no decode request waits for. Looks at every
    /// request: see [`Exposed`].
    fn host_usage(&self, host: &str) -> usize {
        let quarantined = self.quarantine.values().filter(|q| q.host == host);
        let quarantined: usize = quarantined.map(|q| q.slots.len()).sum();
        let unparked = self.requests.values().filter(|r| r.parked.is_none());
        let leases = unparked
            .filter_map(|r| r.lease())
            .filter(|l| l.host == host);
        let open = |chunk: &&Chunk| matches!(chunk, Chunk::Open { .. });
        let open: usize = leases.map(|l| l.chunks.iter().filter(open).count()).sum();
        quarantined + open + self.lmcache.held_by(host)
    }

    /// Turns the held alloc request into a lease.
    fn lease_for(&mut self, id: &RequestId, have_tokens: u32) -> Option<LeaseId> {
        let lease_id = LeaseId(self.rng.random());
        let chunk_tokens = self.config.chunk_tokens;
        let request = self.requests.get_mut(id)?;
        let Allocation::Pending(pending) =
            std::mem::replace(&mut request.allocation, Allocation::None)
        else {
            return None;
        };
        let Pending {
            route,
            host,
            request: asked,
            x,
            ..
        } = pending;
        let term =
            bounded(x.lease_ms, self.config.max_lease).max(MIN_LEASE.min(self.config.max_lease));
        let chunks = (0..chunks_of(x.tokens, chunk_tokens))
            .map(|i| {
                let (from, to) = chunk_span(i, x.tokens, have_tokens, chunk_tokens);
                if from < to {
                    Chunk::Waiting
                } else {
                    Chunk::Skipped
                }
            })
            .collect();
        request.record.tokens = x.tokens;
        request.record.have_tokens = have_tokens;
        request.record.transport.clone_from(&x.transport);
        request.record.peer.clone_from(&x.id);
        request.allocation = Allocation::Leased(Lease {
            id: lease_id,
            route,
            sender: SenderId {
                id: x.id,
                epoch: x.epoch,
            },
            host,
            transport: x.transport,
            seq: x.seq,
            keys: asked.keys,
            tokens: x.tokens,
            first_token: have_tokens,
            chunks,
            term,
            deadline: self.now + term,
            idle: None,
            end_reason: None,
        });
        self.leases.insert(lease_id, id.clone());
        Some(lease_id)
    }

    /// Opens what slots there are for a new lease and answers the sender.
    fn answer_windowed(&mut self, id: &RequestId, lease_id: LeaseId) {
        // Whoever waits already comes first; a newcomer takes what is left.
        let others_wait = self.waiting.iter().any(|w| {
            let lease = self.requests.get(w).and_then(|r| r.lease());
            lease.is_some_and(|l| l.waiting().next().is_some())
        });
        let Some(lease) = self.requests.get_mut(id).and_then(|r| r.lease_mut()) else {
            return;
        };
        let mut window = 0;
        let wanted: Vec<usize> = lease.waiting().collect();
        for index in wanted {
            let slot = if others_wait { None } else { self.slots.take() };
            let Some(slot) = slot else {
                window += 1;
                continue;
            };
            lease.chunks[index] = Chunk::Open {
                slot,
                writing: false,
            };
            self.actions.push_back(Action::Open {
                lease: lease_id,
                slot,
            });
        }
        if let Some(request) = self.requests.get_mut(id) {
            request.record.windowed = window;
        }
        if window > 0 && !self.waiting.contains(id) {
            self.waiting.push_back(id.clone());
        }
        self.send_response(id);
    }

    /// Answers the alloc request of a lease with what it holds now: also the answer to a repetition.
    pub(super) fn send_response(&mut self, id: &RequestId) {
        let Some(lease) = self.requests.get(id).and_then(|r| r.lease()) else {
            return;
        };
        let mut remote_indexes = Vec::new();
        let mut already_sent_indexes = Vec::new();
        for (position, chunk) in (0u32..).zip(&lease.chunks) {
            match chunk {
                Chunk::Skipped | Chunk::Released => already_sent_indexes.push(position),
                Chunk::Waiting => remote_indexes.push(-1),
                Chunk::Open { slot, .. } | Chunk::Written { slot } | Chunk::Ready { slot } => {
                    remote_indexes.push(i64::from(slot.0));
                }
            }
        }
        let window = remote_indexes.iter().filter(|&&i| i < 0).count();
        let response = AllocResponse {
            remote_indexes,
            already_sent_indexes,
            x: Some(AllocResponseX {
                v: VERSION,
                seq: lease.seq,
                epoch: self.config.epoch,
                lease: Some(lease.id),
                have_tokens: lease.first_token,
                window: u32::try_from(window).unwrap_or(u32::MAX),
                reason: None,
                retry_ms: 0,
            }),
        };
        self.send(lease.route, ToSender::AllocResponse(response));
    }

    /// Tells the sender of further slots.
    pub(super) fn send_more(&mut self, id: &RequestId, chunks: &[usize]) {
        let Some(lease) = self.requests.get(id).and_then(|r| r.lease()) else {
            return;
        };
        let mut more = More {
            lease: lease.id,
            epoch: self.config.epoch,
            chunks: Vec::new(),
            indexes: Vec::new(),
        };
        for &index in chunks {
            if let Some(slot) = lease.chunks[index].slot() {
                more.chunks.push(u32::try_from(index).unwrap_or(u32::MAX));
                more.indexes.push(slot.0);
            }
        }
        self.send(lease.route, ToSender::More(more));
    }

    /// Answers an alloc request with a reason.
    pub(super) fn send_refusal(&mut self, route: Route, seq: u64, keys: usize, reason: Reason) {
        let retry_ms = match reason {
            Reason::NoRoom | Reason::Busy | Reason::Quarantined => RETRY_MS,
            _ => 0,
        };
        let response = AllocResponse {
            remote_indexes: vec![-1; keys],
            already_sent_indexes: Vec::new(),
            x: Some(AllocResponseX {
                v: VERSION,
                seq,
                epoch: self.config.epoch,
                lease: None,
                have_tokens: 0,
                window: 0,
                reason: Some(reason),
                retry_ms,
            }),
        };
        self.send(route, ToSender::AllocResponse(response));
    }

    pub(super) fn send(&mut self, route: Route, message: ToSender) {
        self.actions.push_back(Action::Send { route, message });
    }
}

/// What each host is exposed to, counted once a turn: for each question anew, as many questions as there may
/// be would cost the square of that with every event.
#[derive(Debug, Default)]
pub(super) struct Exposed {
    hosts: HashMap<String, usize>,
}

impl Exposed {
    pub(super) fn to(&mut self, host: &str, receiver: &Receiver) -> usize {
        if let Some(&slots) = self.hosts.get(host) {
            return slots;
        }
        let slots = receiver.host_usage(host);
        self.hosts.insert(host.to_owned(), slots);
        slots
    }

    /// It has got so many more.
    pub(super) fn add(&mut self, host: &str, slots: usize) {
        *self.hosts.entry(host.to_owned()).or_default() += slots;
    }
}

/// How an unparked request fared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    /// It has got its slots, or wants none any more.
    Over,
    /// Its host has its share: whoever comes after it need not wait.
    Waits,
    /// There is no room, and nobody may overtake it.
    Blocks,
}

/// This part of the buffer is kept from the unparked requests of any one host; nothing of a smaller one.
/// Parked requests go on in a window of a few slots.
const KEPT: u32 = 16;
/// How long a decode request waits on after a question with other keys: its own sender's is under way, or never comes.
const MISMATCH: Duration = Duration::from_secs(1);
/// No lease ends sooner, whatever its sender asks for: what ends is quarantined.
const MIN_LEASE: Duration = Duration::from_secs(1);
/// The hint on refusals that pass: about the time in which a busy buffer turns over.
const RETRY_MS: u32 = 100;
