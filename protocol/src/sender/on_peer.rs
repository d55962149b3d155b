//! Handles the messages of receivers.

use super::request::{Chunk, Lease, Phase, Told};
use super::{Action, GRAVES, Link, Sender};
use crate::local::{Granted, Target};
use crate::message::{
    Ack, AllocResponse, CancelNotif, CancelX, More, ToReceiver, ToSender, Unwanted,
};
use crate::{Epoch, LeaseId, Reason, RequestId, SlotIndex, VERSION};

impl Sender {
    pub(super) fn on_message(&mut self, to: &Target, message: ToSender) {
        match message {
            ToSender::AllocResponse(response) => self.on_response(to, &response),
            ToSender::More(more) => self.on_more(to, &more),
            ToSender::Ack(ack) => self.on_ack(to, &ack),
            ToSender::Unwanted(unwanted) => self.on_unwanted(to, &unwanted),
        }
    }

    /// Handles the answer to an alloc request or to a cancel.
    fn on_response(&mut self, to: &Target, response: &AllocResponse) {
        let Some(x) = &response.x else {
            self.on_lmcache_response(to, response);
            return;
        };
        let asked = self.requests.iter().find_map(|(id, r)| match &r.phase {
            Phase::Asking { seq, .. } | Phase::Withdrawing(Told { seq, .. })
                if *seq == x.seq && r.to == *to =>
            {
                Some(id.clone())
            }
            _ => None,
        });
        let request = asked.as_ref().and_then(|id| self.requests.get(id));
        let withdrawn = request.is_some_and(|r| matches!(r.phase, Phase::Withdrawing(_)));
        let buried = |lease| self.graves.iter().any(|(known, _)| *known == lease);
        match (asked, x.lease, x.reason) {
            (Some(id), lease, _) if withdrawn && lease.is_none_or(buried) => self.forget(&id),
            // The sender has already told the receiver that it does not write under this lease. The
            // receiver may have freed the slots since then, so the sender must not write.
            (Some(id), Some(lease), _) if buried(lease) => {
                self.end(&id, Reason::Cancelled);
            }
            (Some(id), Some(lease), _) => {
                self.on_lease(&id, response, lease);
                if withdrawn {
                    self.end(&id, Reason::PeerLost);
                }
            }
            (Some(id), None, Some(Reason::StaleEpoch)) => self.relink(&id),
            (Some(id), None, reason) => {
                self.end(&id, reason.unwrap_or(Reason::NoRoom));
            }
            (None, Some(lease), _) if !self.knows(to, lease) => self.disown(to, lease, x.epoch),
            (None, None, None) => self.on_cancel_answered(to, x.seq),
            (None, _, _) => {}
        }
    }

    fn knows(&self, to: &Target, lease: LeaseId) -> bool {
        self.request_of(to, lease).is_some()
    }

    fn request_of(&self, to: &Target, lease: LeaseId) -> Option<RequestId> {
        self.requests
            .iter()
            .find(|(_, r)| r.to == *to && r.lease().is_some_and(|l| l.id == lease))
            .map(|(id, _)| id.clone())
    }

    /// Notes the slots that the receiver has granted with a lease.
    fn on_lease(&mut self, id: &RequestId, response: &AllocResponse, lease: LeaseId) {
        let now = self.now;
        let Some(x) = &response.x else {
            return;
        };
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let plan = self.chunking.plan(request.tokens, x.have_tokens);
        let mut indexes = response.remote_indexes.iter();
        let mut sound = x.have_tokens < request.tokens;
        for (position, chunk) in (0u32..).zip(&mut request.chunks) {
            let skipped = response.already_sent_indexes.contains(&position);
            sound &= skipped == plan.is_empty(position);
            if skipped {
                *chunk = Chunk::Skipped;
                continue;
            }
            match indexes.next().copied().map(u32::try_from) {
                Some(Ok(slot)) => {
                    *chunk = Chunk::Remote {
                        to: SlotIndex(slot),
                    }
                }
                // −1: the receiver grants the slot later with `More`.
                Some(Err(_)) => {}
                None => sound = false,
            }
        }
        request.phase = Phase::Leased(Lease {
            id: lease,
            epoch: x.epoch,
            have_tokens: x.have_tokens,
            spoke: now,
            dirty: Vec::new(),
        });
        request.progress = now;
        request.record.alloc_us = now.micros_since(request.since);
        request.record.have_tokens = x.have_tokens;
        request.record.windowed = x.window;
        if !sound {
            self.end(id, Reason::BadRequest);
            return;
        }
        if let Some(engine) = request.engine {
            let granted = Granted::nothing(id.clone(), x.have_tokens);
            self.actions.push_back(Action::Granted(engine, granted));
        }
        // The decode side needs nothing: its window, for example, begins after the last token.
        if request.is_done() {
            self.tell_done(id, None);
            self.forget(id);
        }
    }

    /// Makes one new handshake for a request whose receiver has restarted. After the handshake, the
    /// sender sends a new alloc request.
    fn relink(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        request.phase = Phase::Linking;
        let to = request.to.clone();
        if !matches!(self.links.get(&to), Some(Link::Making(_))) {
            self.links.insert(to.clone(), Link::Making(self.now));
            self.actions.push_back(Action::Link { to });
        }
    }

    /// Notes further slots that the receiver has opened under a lease.
    fn on_more(&mut self, to: &Target, more: &More) {
        let Some(id) = self.request_of(to, more.lease) else {
            // `More` may have overtaken the response that grants the lease. The receiver repeats
            // `More` after `Extend`.
            let asking = |r: &super::Request| matches!(r.phase, Phase::Asking { .. });
            if !self.requests.values().any(|r| r.to == *to && asking(r)) {
                self.disown(to, more.lease, more.epoch);
            }
            return;
        };
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        for (&position, &slot) in more.chunks.iter().zip(&more.indexes) {
            if let Some(chunk) = request.chunks.get_mut(position as usize)
                && *chunk == Chunk::Waiting
            {
                *chunk = Chunk::Remote {
                    to: SlotIndex(slot),
                };
                request.progress = self.now;
            }
        }
    }

    /// Notes which chunks the receiver has acknowledged. Forgets the request when all chunks are
    /// acknowledged.
    fn on_ack(&mut self, to: &Target, ack: &Ack) {
        let Some(id) = self.request_of(to, ack.lease) else {
            return;
        };
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        for &position in &ack.chunks {
            if let Some(chunk) = request.chunks.get_mut(position as usize)
                && matches!(chunk, Chunk::Done { .. })
            {
                *chunk = Chunk::Acked;
            }
        }
        if matches!(request.phase, Phase::Leased(_)) && request.is_acked() {
            self.forget(&id);
        }
    }

    /// Ends a request that the receiver does not want any more.
    fn on_unwanted(&mut self, to: &Target, unwanted: &Unwanted) {
        match self.request_of(to, unwanted.lease) {
            Some(id) => {
                // All chunks are written and only the acknowledgement is missing, so the request
                // does not end early.
                let done = self.requests.get(&id).is_some_and(super::Request::is_done);
                if done {
                    self.forget(&id);
                    self.disown(to, unwanted.lease, unwanted.epoch);
                } else {
                    self.end(&id, unwanted.reason);
                }
            }
            None => self.disown(to, unwanted.lease, unwanted.epoch),
        }
    }

    /// Remembers a lease under which nothing may be written any more, and its dirty slots.
    pub(super) fn bury(&mut self, lease: LeaseId, dirty: Vec<u32>) {
        self.graves.push_back((lease, dirty));
        if self.graves.len() > GRAVES {
            // If the sender forgot a lease with dirty slots, the sender's next answer would free
            // slots in which a write may still arrive.
            let clean = self.graves.iter().position(|(_, dirty)| dirty.is_empty());
            self.graves.remove(clean.unwrap_or(0));
        }
    }

    /// Answers a message about an unknown lease: no write is in flight under the lease, except into
    /// the dirty slots that `graves` remembers.
    pub(super) fn disown(&mut self, to: &Target, lease: LeaseId, epoch: Epoch) {
        let dirty = self.graves.iter().find(|(id, _)| *id == lease);
        let dirty = dirty.map(|(_, slots)| slots.clone()).unwrap_or_else(|| {
            self.bury(lease, Vec::new());
            Vec::new()
        });
        let seq = self.seq();
        let cancel = CancelNotif {
            req_id: String::new(),
            keys: Vec::new(),
            x: Some(CancelX {
                v: VERSION,
                seq,
                lease,
                epoch,
                reason: Reason::Cancelled,
                dirty,
            }),
        };
        self.send(to, ToReceiver::CancelNotif(cancel));
    }
}
