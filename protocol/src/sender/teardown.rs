//! Ends requests and acts on their deadlines.

use std::collections::{BTreeMap, VecDeque};

use super::request::{Chunk, Phase, Told};
use super::{Action, Link, Sender};
use crate::local::Target;
use crate::message::{CancelNotif, CancelX, Extend, ToReceiver};
use crate::{Reason, RequestId, Time, VERSION};

impl Sender {
    /// Ends a request early: tells the engine and the proxy, frees the send slots and posts no more
    /// writes.
    pub(super) fn end(&mut self, id: &RequestId, reason: Reason) {
        self.tell_done(id, Some(reason));
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        for chunk in &mut request.chunks {
            match *chunk {
                Chunk::Granted { from, to } | Chunk::Staged { from, to } => {
                    *chunk = Chunk::Remote { to };
                    self.slots.give(from);
                }
                Chunk::Filling { from }
                | Chunk::Gathering { from, .. }
                | Chunk::Full { from }
                | Chunk::Asked { from } => {
                    *chunk = Chunk::Waiting;
                    self.slots.give(from);
                }
                _ => {}
            }
        }
        match &mut request.phase {
            Phase::Linking | Phase::Asking { .. } => self.forget(id),
            Phase::Feeding(feeding) => {
                feeding.over = true;
                self.retire_fed(id);
            }
            Phase::Leased(lease) => {
                request.phase = Phase::Closing {
                    lease: lease.clone(),
                    reason,
                    told: None,
                };
                self.close(id);
            }
            Phase::Closing { .. } | Phase::Withdrawing(_) => {}
        }
    }

    /// Tells the engine and the proxy how a request ended, once per request.
    pub(super) fn tell_done(&mut self, id: &RequestId, reason: Option<Reason>) {
        let now = self.now;
        if self.end_fetched(id, reason) {
            return;
        }
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let engine = request.engine.take();
        let gone = reason == Some(Reason::EngineGone);
        if engine.is_none() && (!gone || request.record.reason.is_some()) {
            return;
        }
        request.record.reason = reason;
        let (record, unannounced) = (request.record.clone(), request.unannounced);
        let us = now.micros_since(request.since);
        if let Some(engine) = engine {
            self.tell_ended(engine, id, reason, record.bytes);
        }
        if !unannounced {
            self.actions.push_back(Action::Notify {
                req: id.clone(),
                reason,
                bytes: record.bytes,
                us,
                transport: record.transport.clone(),
            });
        }
        self.actions.push_back(Action::Record(record));
    }

    /// Tells the receiver that a closing lease has ended, after the last write in flight has ended.
    /// If the connection is lost, the sender makes a new connection for this message. Without this
    /// message the lease's slots would stay quarantined until this sender's next request to the
    /// receiver.
    pub(super) fn close(&mut self, id: &RequestId) {
        let seq = self.seq();
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if request.in_flight > 0 {
            return;
        }
        let Phase::Closing {
            lease,
            reason,
            told,
        } = &mut request.phase
        else {
            return;
        };
        let told = told.get_or_insert(Told {
            seq,
            sent: now,
            tries: 0,
        });
        if !told.again(now, &request.to, &mut self.links, &mut self.actions) {
            return;
        }
        let cancel = CancelNotif {
            req_id: request.record.req.0.clone(),
            keys: request.keys.clone(),
            x: Some(CancelX {
                v: VERSION,
                seq: told.seq,
                lease: lease.id,
                epoch: lease.epoch,
                reason: *reason,
                dirty: lease.dirty.clone(),
            }),
        };
        let to = request.to.clone();
        self.send(&to, ToReceiver::CancelNotif(cancel));
    }

    /// Repeats an alloc request over a new connection, because its answer was lost with the old
    /// connection. If the receiver has already ended a lease of this request, the receiver refuses
    /// the request and asks about the lease. If no lease of this request has ended, the receiver
    /// grants a lease, or repeats its earlier grant.
    fn withdraw(&mut self, id: &RequestId) {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let Phase::Withdrawing(told) = &mut request.phase else {
            return;
        };
        if told.tries > PATIENCE {
            self.forget(id);
        } else if told.again(now, &request.to, &mut self.links, &mut self.actions) {
            self.send_ask(id);
        }
    }

    /// Forgets the request whose cancel the receiver has answered.
    pub(super) fn on_cancel_answered(&mut self, to: &Target, seq: u64) {
        let closed = self.requests.iter().find_map(|(id, r)| match &r.phase {
            Phase::Closing {
                told: Some(told), ..
            } if told.seq == seq && r.to == *to => Some(id.clone()),
            _ => None,
        });
        if let Some(id) = closed {
            self.forget(&id);
        }
    }

    /// Forgets a request without a write in flight, and frees its send slots.
    pub(super) fn forget(&mut self, id: &RequestId) {
        let Some(request) = self.requests.remove(id) else {
            return;
        };
        debug_assert_eq!(request.in_flight, 0, "a write names a forgotten request");
        for chunk in &request.chunks {
            if let Some(slot) = chunk.local() {
                self.slots.give(slot);
            }
        }
        if let Some(lease) = request.lease()
            && !lease.dirty.is_empty()
        {
            self.bury(lease.id, lease.dirty.clone());
        }
    }

    /// Ends or withdraws all requests to a receiver after the connection is lost.
    pub(super) fn on_link_lost(&mut self, to: &Target, reason: Reason) {
        self.links.remove(to);
        let affected: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, r)| r.to == *to)
            .map(|(id, _)| id.clone())
            .collect();
        for id in affected {
            let phase = self.requests.get(&id).map(|r| &r.phase);
            if let Some(&Phase::Asking { seq, .. }) = phase {
                self.tell_done(&id, Some(reason));
                self.take_back(&id, seq);
            } else {
                self.end(&id, reason);
            }
        }
    }

    /// Withdraws an alloc request that has not been answered.
    fn take_back(&mut self, id: &RequestId, seq: u64) {
        let (sent, tries) = (self.now, 0);
        if let Some(request) = self.requests.get_mut(id) {
            request.phase = Phase::Withdrawing(Told { seq, sent, tries });
        }
        self.withdraw(id);
    }

    /// Acts on all deadlines that have passed.
    pub(super) fn on_deadlines(&mut self) {
        let now = self.now;
        let failed: Vec<Target> = self
            .links
            .iter()
            .filter(|(_, l)| matches!(l, Link::Making(since) if *since + self.config.link <= now))
            .map(|(to, _)| to.clone())
            .collect();
        for to in failed {
            self.on_link_lost(&to, Reason::NoLink);
        }
        self.expire_kept();
        let due: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, r)| self.deadline_of(r).is_some_and(|d| d <= now))
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            self.on_due(&id);
        }
    }

    /// Acts on the deadline of one request: repeats a message, extends its lease or ends the
    /// request.
    fn on_due(&mut self, id: &RequestId) {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let stalled = request.progress + self.config.stall <= now;
        let done = request.is_done();
        match &mut request.phase {
            Phase::Linking => self.end(id, Reason::NoLink),
            Phase::Withdrawing(_) => self.withdraw(id),
            Phase::Feeding(feeding) => {
                let waits = feeding.waits;
                if waits.is_some_and(|since| self.lmcache_patience(since) <= now) {
                    self.end(id, Reason::AllocTimeout);
                } else if stalled {
                    self.end(id, Reason::Deadline);
                }
            }
            Phase::Asking { sent, first, .. } => {
                let patience = self.config.wait + self.config.park + self.config.repeat * PATIENCE;
                if *first + patience <= now {
                    self.end(id, Reason::AllocTimeout);
                } else if *sent + self.config.repeat <= now {
                    *sent = now;
                    self.send_ask(id);
                } else if stalled {
                    self.end(id, Reason::AllocTimeout);
                }
            }
            Phase::Leased(_) if done => {
                if stalled {
                    // All chunks are written. The receiver ends the lease after its own timeout.
                    self.forget(id);
                } else {
                    self.send_written(id);
                }
            }
            Phase::Leased(_) if stalled => {
                // The reason shows the operator the cause: too few send slots, or no progress of
                // the engine or the receiver.
                let waits = |c: &Chunk| matches!(c, Chunk::Remote { .. });
                let no_slot = self.slots.free() == 0;
                let starved = no_slot
                    && self
                        .requests
                        .get(id)
                        .is_some_and(|r| r.chunks.iter().any(waits));
                let reason = if starved {
                    Reason::NoSendRoom
                } else {
                    Reason::Deadline
                };
                self.end(id, reason);
            }
            Phase::Leased(_) => self.extend(id),
            Phase::Closing {
                told: Some(told), ..
            } => {
                if told.tries > PATIENCE {
                    self.forget(id);
                } else {
                    self.close(id);
                }
            }
            // A write is still in flight. If the lease expired now, the receiver would quarantine
            // its slots.
            Phase::Closing { told: None, .. } => self.extend(id),
        }
    }

    /// Sends a heartbeat that extends a lease, and repeats `Written` for chunks that are not
    /// acknowledged.
    fn extend(&mut self, id: &RequestId) {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let granted = (0u32..)
            .zip(&request.chunks)
            .filter(|(_, c)| !matches!(c, Chunk::Waiting | Chunk::Skipped))
            .map(|(i, _)| i)
            .collect();
        let to = request.to.clone();
        let unacknowledged = request
            .chunks
            .iter()
            .any(|c| matches!(c, Chunk::Done { .. }));
        let Some(lease) = request.lease_mut() else {
            return;
        };
        lease.spoke = now;
        let extend = Extend {
            lease: lease.id,
            epoch: lease.epoch,
            granted,
        };
        self.send(&to, ToReceiver::Extend(extend));
        if unacknowledged {
            self.send_written(id);
        }
    }
}

impl Told {
    /// Counts an attempt, and returns true if the message can be sent. Requests a new handshake if
    /// the connection is lost.
    fn again(
        &mut self,
        now: Time,
        to: &Target,
        links: &mut BTreeMap<Target, Link>,
        actions: &mut VecDeque<Action>,
    ) -> bool {
        self.sent = now;
        match links.get(to) {
            // A handshake is in flight. The timeout `link` limits the handshake's time.
            Some(Link::Making(_)) => false,
            Some(Link::Up { .. } | Link::Lmcache(_)) => {
                self.tries += 1;
                true
            }
            None => {
                self.tries += 1;
                links.insert(to.clone(), Link::Making(now));
                actions.push_back(Action::Link { to: to.clone() });
                false
            }
        }
    }
}

/// The sender stops repeating a message after this many repetitions without an answer.
pub(super) const PATIENCE: u32 = 6;
