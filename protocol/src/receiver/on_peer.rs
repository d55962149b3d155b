//! Handles the messages of senders.

use super::ended::Question;
use super::request::{Allocation, Chunk, Pending, Request};
use super::{Owner, Receiver, Route, SenderId, Unchecked, bounded};
use crate::message::{
    Ack, AllocRequest, AllocResponse, AllocResponseX, AllocX, CancelNotif, Extend, Slots,
    ToReceiver, ToSender, Unwanted, Written,
};
use crate::{Epoch, LeaseId, Reason, RequestId, VERSION};
use std::collections::HashSet;

impl Receiver {
    pub(super) fn on_message(&mut self, route: Route, message: ToReceiver) {
        match message {
            ToReceiver::AllocRequest(request) => self.on_alloc(route, request),
            ToReceiver::CancelNotif(cancel) => self.on_cancel(route, &cancel),
            ToReceiver::Writing(slots) => self.on_writing(route, &slots),
            ToReceiver::Written(written) => self.on_written(route, &written),
            ToReceiver::Extend(extend) => self.on_extend(route, &extend),
        }
    }

    /// Handles an alloc request: repeats the answer to a repetition, refuses the request or holds
    /// it.
    fn on_alloc(&mut self, route: Route, asked: AllocRequest) {
        let Some(x) = asked.x.clone() else {
            self.on_borrow(route, asked);
            return;
        };
        let (id, owner) = (RequestId(asked.req_id.clone()), self.owner_of(route));
        match self.requests.get_mut(&id).map(|r| &mut r.allocation) {
            Some(Allocation::Leased(lease))
                if lease.seq == x.seq
                    && lease.sender.id == x.id
                    && lease.sender.epoch == x.epoch
                    // The answer contains the lease's id, and has one entry per key. So a repeated
                    // alloc request must come from the same party and have the same number of keys.
                    && lease.owner == owner
                    && lease.keys.len() == asked.keys.len() =>
            {
                lease.route = route;
                self.send_response(&id);
                return;
            }
            Some(Allocation::Pending(pending))
                if pending.x.seq == x.seq
                    && pending.x.id == x.id
                    && pending.x.epoch == x.epoch
                    && pending.owner == owner =>
            {
                pending.route = route;
                return;
            }
            _ => {}
        }
        // The sender is reachable, so the receiver asks the sender which quarantined slots are
        // free. The sender's answer may free slots.
        self.ask_about_quarantined(route, &owner, &x);
        if let Err(reason) = self.admit(&id, &asked, &x, route, &owner) {
            self.send_refusal(route, x.seq, asked.keys.len(), reason);
            return;
        }
        let park = (x.park_ms > 0).then(|| self.now + bounded(x.park_ms, self.config.max_wait));
        let wait = self.now + bounded(x.wait_ms, self.config.max_wait);
        let wanted = self.chunking.plan(x.tokens, 0).wanted();
        self.make_way(&id, |old| gives_way_to_question(old, &owner));
        let request = self
            .requests
            .entry(id.clone())
            .or_insert_with(|| Request::new(&id));
        request.heard.question = Some(Question::of(&x));
        request.allocation = Allocation::Pending(Pending {
            route,
            owner,
            request: asked,
            x,
            wanted,
            park,
            // The wait for slots must not end before the wait for the decode request.
            wait: wait.max(park.unwrap_or_default()),
        });
        self.list_goes_on(&id);
        self.consider(&id);
    }

    /// Lets the other prompts of a list wait for their sender again. The prefill engine computes the
    /// prompts of a long list one after the other, and asks for slots for each prompt when it begins
    /// the prompt.
    fn list_goes_on(&mut self, id: &RequestId) {
        let id = id.of_client();
        // '0' is the character after '/'.
        let others = RequestId(format!("{id}/"))..RequestId(format!("{id}0"));
        for (_, request) in self.requests.range_mut(others) {
            if let Some(parked) = &mut request.parked
                && !parked.mismatched
            {
                parked.no_sender = self.now + self.config.no_sender;
            }
        }
    }

    /// Asks a sender that is reachable again how the writes of its quarantined leases ended. The
    /// receiver asks only about leases of the same party. If the receiver asked about leases of
    /// others, a process could use another sender's name, learn the id of that sender's lease
    /// and free the lease's slots.
    fn ask_about_quarantined(&mut self, route: Route, owner: &Owner, x: &AllocX) {
        let of_sender = |s: &SenderId| s.id == x.id && s.epoch == x.epoch;
        let leases: Vec<LeaseId> = self
            .quarantine
            .iter()
            .filter(|(_, q)| of_sender(&q.sender) && q.owner == *owner)
            .map(|(lease, _)| *lease)
            .collect();
        for lease in leases {
            let unwanted = Unwanted {
                lease,
                epoch: self.config.epoch,
                reason: Reason::Quarantined,
            };
            self.send(route, ToSender::Unwanted(unwanted));
        }
    }

    /// Checks whether an alloc request can be held or granted, and returns the reason if it cannot.
    fn admit(
        &mut self,
        id: &RequestId,
        asked: &AllocRequest,
        x: &AllocX,
        route: Route,
        owner: &Owner,
    ) -> Result<(), Reason> {
        if x.to_epoch != self.config.epoch {
            return Err(Reason::StaleEpoch);
        }
        let chunks = self.chunking.plan(x.tokens, 0).chunks() as usize;
        if asked.req_id.is_empty() || asked.keys.is_empty() || chunks != asked.keys.len() {
            return Err(Reason::BadRequest);
        }
        if let Some(reason) = self.ended.asked(id, &Question::of(x), self.now) {
            return Err(reason);
        }
        if self.quarantined_by(&x.id, owner) > self.config.max_quarantined as usize {
            return Err(Reason::Quarantined);
        }
        match self.requests.get(id) {
            Some(Request {
                allocation: Allocation::None,
                lent,
                ..
            }) if lent.is_empty() => Ok(()),
            Some(old) if gives_way_to_question(old, owner) => Ok(()),
            Some(_) => Err(Reason::Duplicate),
            None if self.draining => Err(Reason::Draining),
            None if self.is_full_for(route, owner) => Err(Reason::Busy),
            None => Ok(()),
        }
    }

    /// Returns true if the table of requests is full, or if this connection or its party has
    /// reached its quota. The quota keeps room for other senders and for parked requests.
    fn is_full_for(&self, route: Route, owner: &Owner) -> bool {
        let max = self.config.max_requests;
        if self.requests.len() >= max {
            return true;
        }
        let (mut connection, mut all) = (0, 0);
        for request in self.requests.values().filter(|r| r.parked.is_none()) {
            let from = match &request.allocation {
                Allocation::None => continue,
                Allocation::Pending(pending) => (pending.route, &pending.owner),
                Allocation::Leased(lease) => (lease.route, &lease.owner),
            };
            connection += usize::from(from.0 == route);
            all += usize::from(from.1 == owner);
        }
        // One connection may have half of the table, and one party may have three quarters of the
        // table.
        connection * 2 >= max || (*owner != Owner::Unknown && all * 4 >= max * 3)
    }

    /// Returns the request of a lease of this epoch, and extends the lease's deadline. For an
    /// unknown lease, and for the lease of another principal, answers `Unwanted` and returns
    /// `None`: a member of the roster must not learn whether another member's lease exists.
    fn leased(&mut self, route: Route, lease: LeaseId, epoch: Epoch) -> Option<RequestId> {
        let now = self.now;
        let owner = self.owner_of(route);
        let id = self
            .leases
            .get(&lease)
            .filter(|_| epoch == self.config.epoch);
        let found = id.cloned().and_then(|id| {
            let lease = self.requests.get_mut(&id)?.lease_mut()?;
            if !owner.may_act_for(&lease.owner) {
                return None;
            }
            lease.route = route;
            if !lease.is_written() {
                lease.deadline = now + lease.term;
            }
            Some(id)
        });
        if found.is_none() {
            let unwanted = Unwanted {
                lease,
                epoch,
                reason: Reason::LeaseExpired,
            };
            self.send(route, ToSender::Unwanted(unwanted));
        }
        found
    }

    /// Notes that writes into these slots are in flight.
    fn on_writing(&mut self, route: Route, slots: &Slots) {
        let Some(id) = self.leased(route, slots.lease, slots.epoch) else {
            return;
        };
        let Some(lease) = self.requests.get_mut(&id).and_then(Request::lease_mut) else {
            return;
        };
        let named = set(&slots.indexes);
        for chunk in &mut lease.chunks {
            if let Chunk::Open { slot, writing } = chunk {
                *writing |= named.contains(&slot.0);
            }
        }
    }

    /// Handles the report that chunks are written: closes their slots, tells the engine and
    /// acknowledges the report.
    fn on_written(&mut self, route: Route, written: &Written) {
        if self.may_free(route, written.lease) {
            // The sender reports that these writes have ended, so no write can still arrive in
            // their slots.
            let named = set(&written.indexes);
            self.unquarantine(written.lease, |slot| named.contains(&slot.0));
        }
        let Some(id) = self.leased(route, written.lease, written.epoch) else {
            return;
        };
        let mut landed = Vec::new();
        let mut closed = Vec::new();
        if let Some(request) = self.requests.get_mut(&id) {
            let record = &mut request.record;
            if let Allocation::Leased(lease) = &mut request.allocation {
                let plan = lease.plan(&self.chunking);
                for (&chunk, &index) in written.chunks.iter().zip(&written.indexes) {
                    let position = chunk as usize;
                    let Some(Chunk::Open { slot, .. }) = lease.chunks.get(position).copied() else {
                        continue; // a repetition
                    };
                    // If the message names a slot that was not granted for this chunk, the granted
                    // slot does not contain the chunk.
                    if slot.0 != index {
                        continue;
                    }
                    record.chunks += 1;
                    record.bytes += plan.size(chunk);
                    lease.chunks[position] = Chunk::Written { slot };
                    landed.push(position);
                    closed.push(slot);
                }
            }
        }
        // A slot must be closed before the engine reads it: a late write would change the KV.
        for slot in closed {
            self.actions.push_back(super::Action::Close { slot });
        }
        let ack = Ack {
            lease: written.lease,
            epoch: self.config.epoch,
            chunks: written.chunks.clone(),
        };
        self.landed(&id, &landed);
        self.send(route, ToSender::Ack(ack));
    }

    /// Returns the chunks of a `Written` message whose checksums must be compared. These are the
    /// open chunks that the message names with their granted slots. Each chunk is returned once,
    /// even if the message repeats the chunk. So the receiver computes at most one checksum per
    /// granted slot, and a peer cannot cause unlimited work. The message of another principal than
    /// the lease's has no such chunks: its wrong sums would end the lease.
    pub fn unchecked(&self, route: Route, written: &Written) -> Vec<Unchecked> {
        let id = self
            .leases
            .get(&written.lease)
            .filter(|id| written.epoch == self.config.epoch && self.is_holder(route, id));
        let request = id.and_then(|id| self.requests.get(id));
        let Some(lease) = request.and_then(Request::lease) else {
            return Vec::new();
        };
        if lease.end_reason.is_some() {
            return Vec::new(); // no engine will read this KV
        }
        let plan = lease.plan(&self.chunking);
        let mut seen = HashSet::new();
        let named = written.chunks.iter().zip(&written.indexes);
        named
            .zip(&written.sums)
            .filter_map(|((&chunk, &index), &sum)| {
                let position = chunk as usize;
                let Some(Chunk::Open { slot, .. }) = lease.chunks.get(position).copied() else {
                    return None;
                };
                if slot.0 != index || !seen.insert(chunk) {
                    return None;
                }
                Some(Unchecked {
                    chunk,
                    slot,
                    bytes: plan.size(chunk),
                    sum,
                })
            })
            .collect()
    }

    /// Extends a lease, and repeats `More` for slots that the sender does not know.
    fn on_extend(&mut self, route: Route, extend: &Extend) {
        let Some(id) = self.leased(route, extend.lease, extend.epoch) else {
            return;
        };
        let Some(lease) = self.requests.get(&id).and_then(Request::lease) else {
            return;
        };
        let over = lease.end_reason;
        let known = set(&extend.granted);
        let unknown: Vec<usize> = (0u32..)
            .zip(&lease.chunks)
            .filter(|(i, c)| matches!(c, Chunk::Open { .. }) && !known.contains(i))
            .map(|(i, _)| i as usize)
            .collect();
        if let Some(reason) = over {
            self.send_unwanted(&id, reason);
        } else if !unknown.is_empty() {
            self.send_more(&id, &unknown);
        }
    }

    /// Ends a lease after the sender's confirmation, and quarantines the slots in the message's
    /// list `dirty`.
    fn on_cancel(&mut self, route: Route, cancel: &CancelNotif) {
        if let Some(x) = &cancel.x {
            let named = set(&x.dirty);
            let dirty = |slot: crate::SlotIndex| named.contains(&slot.0);
            if x.epoch == self.config.epoch {
                if self.may_free(route, x.lease) {
                    self.unquarantine(x.lease, |slot| !dirty(slot));
                }
                if let Some(id) = self.leases.get(&x.lease).cloned()
                    && self.is_holder(route, &id)
                {
                    self.end_lease(&id, x.reason, dirty);
                }
            }
            let response = AllocResponse {
                remote_indexes: Vec::new(),
                already_sent_indexes: Vec::new(),
                x: Some(AllocResponseX {
                    v: VERSION,
                    seq: x.seq,
                    epoch: self.config.epoch,
                    lease: None,
                    have_tokens: 0,
                    window: 0,
                    reason: None,
                    retry_ms: 0,
                }),
            };
            self.send(route, ToSender::AllocResponse(response));
        } else {
            self.on_return(route, cancel);
        }
    }

    /// Returns true if a lease is quarantined and the connection may say that its writes have ended.
    fn may_free(&self, route: Route, lease: LeaseId) -> bool {
        let owner = self.owner_of(route);
        let quarantine = self.quarantine.get(&lease);
        quarantine.is_some_and(|q| owner.may_act_for(&q.owner))
    }

    /// Returns true if the connection may act for the sender that has a lease on this request.
    fn is_holder(&self, route: Route, id: &RequestId) -> bool {
        let lease = self.requests.get(id).and_then(Request::lease);
        let owner = self.owner_of(route);
        lease.is_some_and(|lease| owner.may_act_for(&lease.owner))
    }

    /// Ends all requests of a sender whose connection is lost.
    pub(super) fn on_peer_lost(&mut self, route: Route) {
        self.lmcache.lost(route);
        self.owners.remove(&route);
        let lost: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, r)| match &r.allocation {
                Allocation::None => false,
                Allocation::Pending(pending) => pending.route == route,
                Allocation::Leased(lease) => lease.route == route,
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in lost {
            self.lose_sender(&id);
        }
    }
}

/// Returns true if a new alloc request with the same id may replace an old request. An old request
/// that is not wanted any more may be replaced. An old request may also be replaced if its chunks
/// are all written, no decode request has asked for them, and the new alloc request comes from the
/// same party.
fn gives_way_to_question(old: &Request, owner: &Owner) -> bool {
    let idle = |lease: &super::Lease| lease.idle.is_some() && lease.owner == *owner;
    let lease = old.lease().filter(|_| old.parked.is_none());
    old.lent.is_empty() && lease.is_some_and(|lease| lease.end_reason.is_some() || idle(lease))
}

/// Returns the numbers of a message's list as a set. A search in the list for each chunk of the
/// lease would take seconds if the list and the lease are long.
fn set(list: &[u32]) -> HashSet<u32> {
    list.iter().copied().collect()
}
