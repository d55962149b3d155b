//! Ends requests, leases and quarantines.

use super::request::{Allocation, Chunk, Request};
use super::{Action, Quarantine, Receiver, SenderId};
use crate::message::{ToSender, Unwanted};
use crate::{LeaseId, Reason, RequestId, SlotIndex};

impl Receiver {
    /// Ends a request after the engine has read every wanted chunk.
    pub(super) fn finish(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let bytes = request.record.bytes;
        if let Some(parked) = request.parked.take() {
            self.tell_ended(parked.engine, id, None, bytes);
        }
        self.drop_lease(id);
        self.forget_if_empty(id);
    }

    /// Ends a decode request that has not got all of its KV.
    ///
    /// Tells the engine if `tell` is true; `tell` is false if the engine is gone. Slots that the
    /// engine may still read stay lent until the engine releases them.
    pub(super) fn end_parked(&mut self, id: &RequestId, reason: Reason, tell: bool) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let Some(parked) = request.parked.take() else {
            return;
        };
        request.record.reason.get_or_insert(reason);
        let bytes = request.record.bytes;
        if let Allocation::Leased(lease) = &mut request.allocation {
            for (index, chunk) in (0u32..).zip(&mut lease.chunks) {
                if let Chunk::Ready { slot } = *chunk {
                    *chunk = Chunk::Released;
                    request.lent.push((parked.engine, index, slot));
                }
            }
        }
        if tell {
            self.tell_ended(parked.engine, id, Some(reason), bytes);
        }
        self.drop_expected(id);
        match self.requests.get(id).map(|r| &r.allocation) {
            Some(Allocation::Pending(_)) => self.refuse_and_end(id, reason),
            Some(Allocation::Leased(_)) => self.settle_over(id, reason),
            Some(Allocation::None) | None => self.forget_if_empty(id),
        }
    }

    /// Ends a lease whose remaining chunks are not wanted: frees the slots of written chunks, and
    /// waits for the sender's confirmation before it frees the open slots.
    pub(super) fn settle_over(&mut self, id: &RequestId, reason: Reason) {
        let Some(lease) = self.requests.get_mut(id).and_then(Request::lease_mut) else {
            return;
        };
        let first = lease.end_reason.replace(reason).is_none();
        let mut freed = Vec::new();
        let mut open = false;
        for chunk in &mut lease.chunks {
            match *chunk {
                Chunk::Waiting => *chunk = Chunk::Skipped,
                Chunk::Written { slot } => {
                    *chunk = Chunk::Released;
                    freed.push(slot);
                }
                Chunk::Open { .. } => open = true,
                Chunk::Skipped | Chunk::Ready { .. } | Chunk::Released => {}
            }
        }
        for slot in freed {
            self.free(slot);
        }
        if first {
            self.send_unwanted(id, reason);
        }
        if !open {
            self.drop_lease(id);
            self.forget_if_empty(id);
        }
    }

    /// Tells the sender that a lease's data is not wanted any more.
    pub(super) fn send_unwanted(&mut self, id: &RequestId, reason: Reason) {
        let Some(lease) = self.requests.get(id).and_then(Request::lease) else {
            return;
        };
        if lease.sender.is_lmcache() {
            return; // LMCache does not know this message, and has written everything
        }
        let unwanted = Unwanted {
            lease: lease.id,
            epoch: self.config.epoch,
            reason,
        };
        self.send(lease.route, ToSender::Unwanted(unwanted));
    }

    /// Ends a lease now. Quarantines the open slots for which `dirty` returns true. Frees the other
    /// open slots, because the sender has confirmed that it does not write into these slots.
    pub(super) fn end_lease(
        &mut self,
        id: &RequestId,
        reason: Reason,
        dirty: impl Fn(SlotIndex) -> bool,
    ) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let Allocation::Leased(lease) = &mut request.allocation else {
            return;
        };
        // If all chunks are written, the lease stays: the decode request may still read them.
        if lease.is_written() && lease.end_reason.is_none() {
            return;
        }
        // A write may still arrive in an open slot. No write can arrive in a written slot. The
        // engine keeps the ready slots until it releases them.
        let mut quarantined = Vec::new();
        let mut freed = Vec::new();
        let mut written = Vec::new();
        for chunk in &mut lease.chunks {
            match *chunk {
                Chunk::Open { slot, .. } => {
                    *chunk = Chunk::Released;
                    if dirty(slot) {
                        quarantined.push(slot);
                    } else {
                        freed.push(slot);
                    }
                }
                Chunk::Written { slot } => {
                    *chunk = Chunk::Released;
                    written.push(slot);
                }
                Chunk::Waiting => *chunk = Chunk::Skipped,
                Chunk::Skipped | Chunk::Ready { .. } | Chunk::Released => {}
            }
        }
        let (lease_id, sender) = (lease.id, lease.sender.clone());
        let owner = lease.owner.clone();
        let transport = lease.transport.clone();
        lease.end_reason.get_or_insert(reason);
        request.record.reason.get_or_insert(reason);
        for slot in freed {
            self.close_and_free(slot);
        }
        for slot in written {
            self.free(slot);
        }
        if !quarantined.is_empty() {
            for &slot in &quarantined {
                self.actions.push_back(Action::Close { slot });
            }
            self.quarantine.insert(
                lease_id,
                Quarantine {
                    sender: sender.clone(),
                    owner,
                    slots: quarantined,
                },
            );
            self.actions.push_back(Action::Fence {
                sender,
                lease: lease_id,
                transport,
            });
        }
        self.end_parked(id, reason, true);
        self.drop_lease(id);
        self.forget_if_empty(id);
    }

    /// Ends the sender's part of a request after the connection is lost. Quarantines the open
    /// slots, because writes may still arrive.
    pub(super) fn lose_sender(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        match &request.allocation {
            Allocation::None => {}
            Allocation::Pending(_) => {
                request.allocation = Allocation::None;
                request.record.reason.get_or_insert(Reason::PeerLost);
                self.end_parked(id, Reason::PeerLost, true);
                self.forget_if_empty(id);
            }
            Allocation::Leased(_) => self.end_lease(id, Reason::PeerLost, |_| true),
        }
    }

    /// Ends a request with a chunk whose checksum is wrong.
    pub(super) fn on_corrupt(&mut self, lease: LeaseId) {
        if let Some(id) = self.leases.get(&lease).cloned() {
            self.end_parked(&id, Reason::BadSum, true);
            self.settle_over(&id, Reason::BadSum);
        }
    }

    /// Frees quarantined slots after a proof that no write can still arrive in them.
    pub(super) fn on_fenced(&mut self, sender: &SenderId, lease: Option<LeaseId>) {
        let proven: Vec<LeaseId> = self
            .quarantine
            .iter()
            .filter(|(id, q)| q.sender == *sender && lease.is_none_or(|l| l == **id))
            .map(|(id, _)| *id)
            .collect();
        for id in proven {
            self.unquarantine(id, |_| true);
        }
    }

    /// Frees the quarantined slots for which `clean` returns true.
    pub(super) fn unquarantine(&mut self, lease: LeaseId, clean: impl Fn(SlotIndex) -> bool) {
        let Some(quarantine) = self.quarantine.get_mut(&lease) else {
            return;
        };
        let (free, rest): (Vec<_>, Vec<_>) =
            quarantine.slots.drain(..).partition(|&slot| clean(slot));
        quarantine.slots = rest;
        if quarantine.slots.is_empty() {
            self.quarantine.remove(&lease);
        }
        for slot in free {
            self.free(slot);
        }
    }

    /// Refuses a held alloc request and ends the request for both sides.
    pub(super) fn refuse_and_end(&mut self, id: &RequestId, reason: Reason) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if let Allocation::Pending(pending) =
            std::mem::replace(&mut request.allocation, Allocation::None)
        {
            request.record.peer.clone_from(&pending.x.id);
            request.record.tokens = pending.x.tokens;
            request.record.reason.get_or_insert(reason);
            self.send_refusal(
                pending.route,
                pending.x.seq,
                pending.request.keys.len(),
                reason,
            );
        }
        self.end_parked(id, reason, true);
        self.forget_if_empty(id);
    }

    /// Acts on all deadlines that have passed.
    pub(super) fn on_deadlines(&mut self) {
        let now = self.now;
        let due: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, r)| r.deadline().is_some_and(|d| d <= now))
            .map(|(id, _)| id.clone())
            .collect();
        let mut late = Vec::new();
        for id in due {
            if self.on_due(&id) {
                late.push(id);
            }
        }
        if late.is_empty() {
            return;
        }
        // The receiver tries again to serve these requests, because this event may have freed
        // slots.
        self.serve();
        for id in late {
            let allocation = self.requests.get(&id).map(|r| &r.allocation);
            if matches!(allocation, Some(Allocation::Pending(_))) {
                self.refuse_and_end(&id, Reason::NoRoom);
            }
        }
    }

    /// Acts on the deadlines of one request. Returns true if the alloc request of this request has
    /// waited for slots for the maximum time.
    fn on_due(&mut self, id: &RequestId) -> bool {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return false;
        };
        if let Some(parked) = &request.parked {
            if parked.deadline <= now {
                self.end_parked(id, Reason::Deadline, true);
                return false;
            }
            if parked.no_sender <= now && matches!(request.allocation, Allocation::None) {
                let reason = if parked.mismatched {
                    Reason::KeyMismatch
                } else {
                    Reason::NoSender
                };
                self.end_parked(id, reason, true);
                return false;
            }
        }
        match &mut request.allocation {
            Allocation::None => {}
            Allocation::Pending(pending) => {
                // The request no longer waits for its decode request. From now on it waits only for
                // slots.
                if pending.park.is_some_and(|t| t <= now) {
                    pending.park = None;
                    self.consider(id);
                } else {
                    return pending.park.is_none() && pending.wait <= now;
                }
            }
            Allocation::Leased(lease) if lease.deadline <= now => {
                if lease.is_written() && request.parked.is_none() {
                    let sender = lease.sender.clone();
                    self.readers.unread(&sender);
                    self.end_unclaimed(id);
                } else if !lease.is_written() {
                    let reason = lease.end_reason.unwrap_or(Reason::LeaseExpired);
                    self.send_unwanted(id, reason);
                    self.end_lease(id, reason, |_| true);
                }
            }
            Allocation::Leased(_) => {}
        }
        false
    }

    fn drop_lease(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if let Allocation::Leased(lease) =
            std::mem::replace(&mut request.allocation, Allocation::None)
        {
            self.leases.remove(&lease.id);
        }
    }

    /// Forgets a request that has no decode request, no sender and no slots, and reports its
    /// record.
    pub(super) fn forget_if_empty(&mut self, id: &RequestId) {
        let empty = self.requests.get(id).is_some_and(|r| {
            r.parked.is_none() && matches!(r.allocation, Allocation::None) && r.lent.is_empty()
        });
        if !empty {
            return;
        }
        if let Some(request) = self.requests.remove(id) {
            self.waiting.retain(|w| w != id);
            if request.record.req == *id {
                self.ended
                    .insert(id, request.record.reason, request.heard, self.now);
            }
            self.actions.push_back(Action::Record(request.record));
        }
    }
}
