//! Grants slots and answers alloc requests.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use rand::Rng;

use super::reclaim::Blocked;
use super::request::{Allocation, Chunk, Lease, Pending};
use super::{Action, Owner, Receiver, SenderId, bounded};
use crate::message::{AllocResponse, AllocResponseX, More, ToSender};
use crate::receiver::Route;
use crate::{LeaseId, Reason, RequestId, VERSION};

impl Receiver {
    /// Gives free slots to waiting requests until no slot can be given to any of them.
    ///
    /// Leases of parked requests come first and get one slot each in turn. Parked requests occupy
    /// KV blocks of the engine, and each lease needs only one slot to make progress. Alloc requests
    /// that need all their slots at once follow in the order of their arrival.
    ///
    /// If slots are missing, the receiver frees written KV that no decode request has asked for.
    pub(super) fn serve(&mut self) {
        while let Some(blocked) = self.serve_once() {
            if !self.reclaim(&blocked) {
                return;
            }
        }
    }

    /// Gives the free slots to waiting requests once. Returns the resource that a request still
    /// waits for; `None` if no request waits.
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
                    // The lease stays in the queue for the next free slot.
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
                    // Each lease gets one slot per turn: a long prompt must not take all slots
                    // before a short prompt gets its first slot.
                    grants.entry(id.clone()).or_default().push(index);
                    turn.push_back(id);
                }
            }
        }
        // The receiver sends one message per lease instead of one message per slot.
        for (id, chunks) in grants {
            self.send_more(&id, &chunks);
        }
        let mut blocked = false;
        let mut exposed = Exposed::default();
        // No later request may overtake a request that needs all its slots at once: otherwise that
        // request could wait for ever. A request that exceeds its party's quota blocks no other
        // request.
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

    /// Decides about an alloc request that has not been answered: grants a lease, refuses the
    /// request or makes it wait.
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
            None if pending.wanted > self.quota(&pending.owner) => {
                self.refuse_and_end(id, Reason::TooLarge);
            }
            None => {
                if !self.waiting.contains(id) {
                    self.waiting.push_back(id.clone());
                }
            }
        }
    }

    /// Refuses an alloc request whose keys differ from the keys of the parked request. The alloc
    /// request may come from any sender, so the parked request still waits for its own sender. The
    /// wait is short, because in most cases the two sides are configured differently.
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

    /// Grants all slots that an unparked request needs, if they are free and no earlier request
    /// waits for slots.
    fn try_unparked(&mut self, id: &RequestId, blocked: bool, exposed: &mut Exposed) -> Admission {
        let Some(Allocation::Pending(pending)) = self.requests.get(id).map(|r| &r.allocation)
        else {
            return Admission::Over;
        };
        let (wanted, owner) = (pending.wanted, pending.owner.clone());
        if exposed.to(&owner, self) + wanted > self.quota(&owner) {
            return Admission::Waits;
        }
        if blocked || wanted > self.slots.free() as usize {
            return Admission::Blocks;
        }
        if let Some(lease) = self.lease_for(id, 0) {
            self.answer_windowed(id, lease);
            exposed.add(&owner, wanted);
        }
        Admission::Over
    }

    /// Returns the number of slots that one party may have for requests that are not parked. The
    /// quota is smaller than the buffer: any process that reaches the port can ask for slots under
    /// any name, and leave these slots quarantined for ever.
    pub(super) fn quota(&self, owner: &Owner) -> usize {
        let total = self.slots.total();
        let kept = match owner {
            Owner::Unknown => 0,
            Owner::Host(_) | Owner::Principal(_) => total / KEPT,
        };
        (total - kept) as usize
    }

    /// Returns the number of slots that a party has for requests that are not parked, including
    /// quarantined slots. Each call goes through all requests, so [`Exposed`] keeps the result.
    fn usage(&self, owner: &Owner) -> usize {
        let quarantined = self.quarantine.values().filter(|q| q.owner == *owner);
        let quarantined: usize = quarantined.map(|q| q.slots.len()).sum();
        let unparked = self.requests.values().filter(|r| r.parked.is_none());
        let leases = unparked
            .filter_map(|r| r.lease())
            .filter(|l| l.owner == *owner);
        let open = |chunk: &&Chunk| matches!(chunk, Chunk::Open { .. });
        let open: usize = leases.map(|l| l.chunks.iter().filter(open).count()).sum();
        quarantined + open + self.lmcache.held_by(owner)
    }

    /// Turns the held alloc request into a lease and returns the lease's id.
    fn lease_for(&mut self, id: &RequestId, have_tokens: u32) -> Option<LeaseId> {
        let lease_id = LeaseId(self.rng.random());
        let request = self.requests.get_mut(id)?;
        let Allocation::Pending(pending) =
            std::mem::replace(&mut request.allocation, Allocation::None)
        else {
            return None;
        };
        let Pending {
            route,
            owner,
            request: asked,
            x,
            ..
        } = pending;
        // If a lease ends early, its open slots are quarantined. So a peer must not get a lease
        // that ends at once.
        let term =
            bounded(x.lease_ms, self.config.max_lease).max(MIN_LEASE.min(self.config.max_lease));
        let plan = self.chunking.plan(x.tokens, have_tokens);
        let chunks = (0..plan.chunks())
            .map(|chunk| {
                if plan.is_empty(chunk) {
                    Chunk::Skipped
                } else {
                    Chunk::Waiting
                }
            })
            .collect();
        // The record needs the sender's data even if the request fails later.
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
            owner,
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
        self.fetches.forget(id);
        // Later messages name only the lease.
        self.leases.insert(lease_id, id.clone());
        Some(lease_id)
    }

    /// Gives free slots to a new lease and answers the sender. The lease gets the rest of its slots
    /// later.
    fn answer_windowed(&mut self, id: &RequestId, lease_id: LeaseId) {
        // If other leases already wait for slots, these leases come first, and the new lease gets
        // no slot yet.
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
        // If no chunk has to move, no `Written` will come.
        let lease = self.requests.get(id).and_then(|r| r.lease());
        if lease.is_some_and(Lease::is_written) {
            self.landed(id, &[]);
        }
    }

    /// Answers the alloc request of a lease with the lease's current slots. A repeated alloc
    /// request gets the same answer.
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

    /// Tells the sender about further slots.
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

    /// Refuses an alloc request with a reason.
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

/// Number of slots per party, counted once per event. If every alloc request counted the slots
/// again, the time per event would grow with the square of the number of requests.
#[derive(Debug, Default)]
pub(super) struct Exposed {
    parties: HashMap<Owner, usize>,
}

impl Exposed {
    /// Returns the number of slots that a party has. The first call counts the slots.
    pub(super) fn to(&mut self, owner: &Owner, receiver: &Receiver) -> usize {
        if let Some(&slots) = self.parties.get(owner) {
            return slots;
        }
        let slots = receiver.usage(owner);
        self.parties.insert(owner.clone(), slots);
        slots
    }

    /// Adds slots that the party has just got.
    pub(super) fn add(&mut self, owner: &Owner, slots: usize) {
        *self.parties.entry(owner.clone()).or_default() += slots;
    }
}

/// Result of an attempt to give slots to an unparked request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    /// The request has got its slots, or needs no slots any more.
    Over,
    /// The request waits for its party's quota. Later requests of other parties do not wait for this
    /// request.
    Waits,
    /// The request waits for free slots. No later request may overtake it.
    Blocks,
}

/// Divisor of the reserve: the unparked requests of one party must leave 1/16 of the buffer to
/// others. This reserve is enough for parked requests to make progress. A buffer of fewer than 16
/// slots has no reserve.
const KEPT: u32 = 16;
/// Time for which a parked request still waits after an alloc request with other keys. If the alloc
/// request of its own sender does not come within this time, it probably never comes.
const MISMATCH: Duration = Duration::from_secs(1);
/// Minimum duration of a lease, even if its sender asks for less. Without a minimum, a lease could
/// end at once, and its open slots would be quarantined.
const MIN_LEASE: Duration = Duration::from_secs(1);
/// `retry_ms` in temporary refusals: about the time until a busy buffer has granted and freed each of its
/// slots once.
const RETRY_MS: u32 = 100;
