//! Handles the messages of the decode engine.

use super::ended::Heard;
use super::request::{Allocation, Chunk, Parked, Request};
use super::{Action, Receiver};
use crate::local::{Await, Ready, Release};
use crate::record::Record;
use crate::{EngineId, Reason, RequestId};
use std::time::Duration;

impl Receiver {
    /// Parks a decode request. The request then waits for its KV. Chunks that are already written
    /// become ready at once.
    pub(super) fn on_await(&mut self, engine: EngineId, message: Await) {
        let id = message.req.clone();
        if let Err(reason) = self.admit_await(&message) {
            // The request that is parked under this id continues.
            if reason != Reason::Duplicate {
                self.drop_expected(&id);
            }
            self.tell_ended(engine, &id, Some(reason), 0);
            return;
        }
        if let Some(reason) = self.take_gone(&id) {
            self.tell_ended(engine, &id, Some(reason), 0);
            let mut record = Record::new(id);
            (record.tokens, record.reason) = (message.tokens, Some(reason));
            self.actions.push_back(Action::Record(record));
            return;
        }
        let (now, written) = (self.now, message.written);
        self.make_way(&id, |old| old.heard.awaited);
        let request = self
            .requests
            .entry(id.clone())
            .or_insert_with(|| Request::new(&id));
        request.record.tokens = message.tokens;
        request.record.have_tokens = message.have_tokens;
        request.heard.awaited = true;
        request.parked = Some(Parked {
            engine,
            keys: message.keys,
            tokens: message.tokens,
            have_tokens: message.have_tokens,
            since: now,
            deadline: now + Duration::from_millis(u64::from(message.deadline_ms)),
            no_sender: now + self.config.no_sender,
            mismatched: false,
        });
        match &request.allocation {
            Allocation::None if written => self.claim(&id),
            Allocation::None => self.fetch(&id),
            Allocation::Pending(_) => self.consider(&id),
            Allocation::Leased(lease) => {
                self.readers.read(&lease.sender);
                let parked = request.parked.as_ref();
                if parked.is_some_and(|p| p.keys != lease.keys || p.tokens != lease.tokens) {
                    self.end_parked(&id, Reason::KeyMismatch, true);
                    return;
                }
                let written: Vec<usize> = (0..lease.chunks.len())
                    .filter(|&i| matches!(lease.chunks[i], Chunk::Written { .. }))
                    .collect();
                self.landed(&id, &written);
            }
        }
    }

    /// Checks whether a decode request can be parked, and returns the reason if it cannot.
    fn admit_await(&mut self, message: &Await) -> Result<(), Reason> {
        let chunks = self.chunking.plan(message.tokens, 0).chunks() as usize;
        if message.req.0.is_empty()
            || message.keys.is_empty()
            || chunks != message.keys.len()
            || message.have_tokens >= message.tokens
        {
            return Err(Reason::BadRequest);
        }
        if let Some((reason, sender)) = self.ended.awaited(&message.req, self.now) {
            if let Some(sender) = sender {
                self.readers.read(&sender);
            }
            return Err(reason);
        }
        match self.requests.get(&message.req) {
            Some(request) if request.parked.is_some() || !request.lent.is_empty() => {
                Err(Reason::Duplicate)
            }
            // An earlier request with this id has ended for the engine. The remaining slots of the
            // earlier request do not block the new request.
            Some(request) if request.heard.awaited => Ok(()),
            // If the lease has ended and the receiver only waits for the sender's last message, the
            // lease cannot deliver KV any more.
            Some(request) => request
                .lease()
                .and_then(|l| l.end_reason)
                .map_or(Ok(()), Err),
            None if self.draining => Err(Reason::Draining),
            None if self.requests.len() >= self.config.max_requests => Err(Reason::Busy),
            None => Ok(()),
        }
    }

    /// Tells the engine that chunks are written, if the request is parked. Frees the slots of
    /// chunks of which the engine needs nothing.
    pub(super) fn landed(&mut self, id: &RequestId, chunks: &[usize]) {
        let now = self.now;
        let unclaimed = now + self.config.unclaimed;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let Allocation::Leased(lease) = &mut request.allocation else {
            return;
        };
        if let Some(reason) = lease.end_reason {
            self.settle_over(id, reason);
            return;
        }
        let Some(parked) = &request.parked else {
            if lease.is_written() {
                lease.deadline = unclaimed;
                lease.idle = Some(now);
            }
            return;
        };
        let mut ready = Ready {
            req: id.clone(),
            first_token: lease.first_token,
            chunks: Vec::new(),
            slots: Vec::new(),
        };
        let needed = self.chunking.plan(lease.tokens, parked.have_tokens);
        let mut unneeded = Vec::new();
        for &index in chunks {
            let Chunk::Written { slot } = lease.chunks[index] else {
                continue;
            };
            let position = u32::try_from(index).unwrap_or(u32::MAX);
            if needed.is_empty(position) {
                lease.chunks[index] = Chunk::Released;
                unneeded.push(slot);
            } else {
                lease.chunks[index] = Chunk::Ready { slot };
                ready.chunks.push(position);
                ready.slots.push(slot.0);
            }
        }
        request.record.ready_us = now.micros_since(parked.since);
        if !ready.chunks.is_empty() {
            self.actions.push_back(Action::Ready(parked.engine, ready));
        }
        for slot in unneeded {
            self.free(slot);
        }
        self.finish_if_complete(id);
    }

    /// Frees the slots of chunks after the engine has read them.
    pub(super) fn on_release(&mut self, engine: EngineId, message: &Release) {
        let Some(request) = self.requests.get_mut(&message.req) else {
            return;
        };
        request.record.scatter_us += message.scatter_us;
        let mut freed = Vec::new();
        let mine = request.parked.as_ref().is_some_and(|p| p.engine == engine);
        if let (true, Allocation::Leased(lease)) = (mine, &mut request.allocation) {
            for &index in &message.chunks {
                if let Some(chunk) = lease.chunks.get_mut(index as usize)
                    && let Chunk::Ready { slot } = *chunk
                {
                    *chunk = Chunk::Released;
                    freed.push(slot);
                }
            }
        }
        request.lent.retain(|&(who, chunk, slot)| {
            let returned = who == engine && message.chunks.contains(&chunk);
            if returned {
                freed.push(slot);
            }
            !returned
        });
        for slot in freed {
            self.free(slot);
        }
        self.finish_if_complete(&message.req);
        self.forget_if_empty(&message.req);
    }

    /// Ends a decode request that its engine does not want any more.
    pub(super) fn on_abort(&mut self, engine: EngineId, id: &RequestId) {
        self.drop_expected(id);
        let Some(request) = self.requests.get(id) else {
            // The abort came before any other message of the request, or after the request's end.
            // The receiver remembers the abort, so that it can answer a late alloc request with the
            // reason.
            self.tell_ended(engine, id, Some(Reason::Unwanted), 0);
            let heard = Heard {
                question: None,
                awaited: true,
            };
            self.ended
                .insert(id, Some(Reason::Unwanted), heard, self.now);
            return;
        };
        if request.parked.as_ref().is_some_and(|p| p.engine == engine) {
            self.end_parked(id, Reason::Unwanted, true);
        }
        self.take_back(engine, id);
    }

    /// Ends all decode requests of an engine whose connection is lost, and frees the slots that the
    /// engine was reading.
    pub(super) fn on_engine_gone(&mut self, engine: EngineId) {
        self.lose_expected(engine);
        let all: Vec<RequestId> = self.requests.keys().cloned().collect();
        for id in all {
            let parked = self.requests.get(&id).and_then(|r| r.parked.as_ref());
            if parked.is_some_and(|p| p.engine == engine) {
                self.end_parked(&id, Reason::EngineGone, false);
            }
            self.take_back(engine, &id);
        }
    }

    /// Frees the slots that the engine was still reading for this request.
    fn take_back(&mut self, engine: EngineId, id: &RequestId) {
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let mut freed = Vec::new();
        request.lent.retain(|&(who, _, slot)| {
            if who == engine {
                freed.push(slot);
            }
            who != engine
        });
        for slot in freed {
            self.free(slot);
        }
        self.forget_if_empty(id);
    }

    /// Ends a request whose chunks have all been read.
    fn finish_if_complete(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        let complete = request.lease().is_some_and(super::Lease::is_complete);
        if complete && request.parked.is_some() {
            self.finish(id);
        }
    }
}
