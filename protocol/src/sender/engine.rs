//! Handles the messages of the prefill engine.

use super::request::{Chunk, Phase, Request, Told};
use super::{Action, After, Link, Sender, WatchId};
use crate::local::{Computing, Reserve, Staged, Target};
use crate::message::{AllocRequest, AllocX, ToReceiver};
use crate::{EngineId, Epoch, Reason, RequestId, VERSION};
use std::time::Duration;

impl Sender {
    pub(super) fn on_reserve(&mut self, engine: EngineId, asked: Reserve) {
        let id = asked.req.clone();
        self.set_aside(&id);
        if let Err(reason) = self.admit(&asked) {
            self.tell_ended(engine, &id, Some(reason), 0);
            // If a request with this id is in flight, that request will notify the proxy. A second
            // notification for the same id could contradict the first notification.
            let owes = self.requests.get(&id).is_some_and(|r| r.engine.is_some());
            if reason != Reason::Duplicate || !owes {
                self.actions.push_back(Action::Notify {
                    req: id.clone(),
                    reason: Some(reason),
                    bytes: 0,
                    us: 0,
                    transport: String::new(),
                });
                let mut refused = Request::new(engine, asked, 0, self.now);
                refused.record.reason = Some(reason);
                self.actions.push_back(Action::Record(refused.record));
            }
            return;
        }
        if asked.keys.is_empty() {
            // No chunk has to move: the sender tells the engine and the proxy at once and does not
            // contact the receiver.
            self.requests
                .insert(id.clone(), Request::new(engine, asked, 0, self.now));
            self.tell_done(&id, None);
            self.forget(&id);
            return;
        }
        let request = Request::new(engine, asked, self.next_order, self.now);
        self.next_order += 1;
        self.requests.insert(id.clone(), request);
        self.start(&id);
    }

    /// Asks the receiver of a new request for slots, or first makes the handshake with it.
    pub(super) fn start(&mut self, id: &RequestId) {
        let Some(to) = self.requests.get(id).map(|request| request.to.clone()) else {
            return;
        };
        match self.links.get(&to) {
            Some(Link::Up { .. }) => self.ask(id),
            Some(Link::Lmcache(_)) => self.feed(id),
            Some(Link::Making(_)) => {}
            None => {
                self.links.insert(to.clone(), Link::Making(self.now));
                self.actions.push_back(Action::Link { to });
            }
        }
    }

    /// Renames a request that waits only for its receiver's last answer, so that a new request can
    /// use the id. The engine and the proxy already know that the old request has ended. The new
    /// name contains a control character, so that no engine can use it as an id.
    pub(super) fn set_aside(&mut self, id: &RequestId) {
        let ended = self.requests.get(id).is_some_and(|old| {
            old.engine.is_none() && !matches!(old.phase, Phase::Feeding(_) | Phase::Linking)
        });
        if !ended {
            return;
        }
        if let Some(request) = self.requests.remove(id) {
            let aside = RequestId(format!("{id}\u{1}{}", self.next_order));
            self.next_order += 1;
            for owner in self.transfers.values_mut().filter(|owner| *owner == id) {
                *owner = aside.clone();
            }
            self.requests.insert(aside, request);
        }
    }

    /// Checks whether the sender can start a request, and returns the reason if it cannot.
    fn admit(&self, asked: &Reserve) -> Result<(), Reason> {
        let chunks = self.chunking.plan(asked.tokens, 0).chunks() as usize;
        if self.config.push_off {
            Err(Reason::PushOff)
        } else if self.draining {
            Err(Reason::Draining)
        } else if asked.keys.is_empty() && asked.tokens > 0 && !asked.req.0.is_empty() {
            // The engine moves no KV of this request. The refusal also notifies the proxy, which
            // waits for this notification.
            Err(Reason::PushOff)
        } else if asked.req.0.is_empty() || chunks != asked.keys.len() {
            Err(Reason::BadRequest)
        } else if self.requests.contains_key(&asked.req) || self.store.has(&asked.req) {
            Err(Reason::Duplicate)
        } else if self.requests.len() >= self.config.max_requests {
            Err(Reason::Busy)
        } else {
            Ok(())
        }
    }

    /// Sends the first alloc request for a request, after the handshake with its receiver. From now
    /// on the receiver knows the request and can tell the decode engine when the request ends. So
    /// the proxy may send the decode request.
    pub(super) fn ask(&mut self, id: &RequestId) {
        let seq = self.seq();
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let again = matches!(request.phase, Phase::Asking { .. }) || request.unannounced;
        request.phase = Phase::Asking {
            seq,
            sent: now,
            first: now,
        };
        if let Some(Link::Up { transport, .. }) = self.links.get(&request.to) {
            request.record.transport.clone_from(transport);
        }
        self.send_ask(id);
        if !again {
            self.actions.push_back(Action::Progress(id.clone()));
        }
    }

    /// Sends or repeats the alloc request.
    pub(super) fn send_ask(&mut self, id: &RequestId) {
        let Some(request) = self.requests.get(id) else {
            return;
        };
        let (Phase::Asking { seq, .. } | Phase::Withdrawing(Told { seq, .. })) = request.phase
        else {
            return;
        };
        let Some(Link::Up { epoch, transport }) = self.links.get(&request.to) else {
            return;
        };
        let message = self.alloc_request(&request.record.req, request, seq, *epoch, transport);
        let to = request.to.clone();
        self.send(&to, ToReceiver::AllocRequest(message));
    }

    /// Returns the alloc request for all chunks of a request.
    fn alloc_request(
        &self,
        id: &RequestId,
        request: &Request,
        seq: u64,
        to_epoch: Epoch,
        transport: &str,
    ) -> AllocRequest {
        let layout = &self.config.layout;
        let full = layout.chunk_tokens;
        // The chunks of the state come after the last chunk of tokens.
        let full_chunks = request.plan(&self.chunking).token_chunks() - 1;
        let last = request.tokens - full_chunks * full;
        let lease = self.config.heartbeat * HEARTBEATS_PER_LEASE;
        AllocRequest {
            keys: request.keys.clone(),
            fmt: layout.format(),
            shape: layout.shape(full.min(request.tokens)),
            dtype: layout.dtype.clone(),
            last_chunk_toks: last,
            req_id: id.0.clone(),
            is_last_batch: true,
            total_chunks: u32::try_from(request.keys.len()).unwrap_or(u32::MAX),
            x: Some(AllocX {
                v: VERSION,
                seq,
                id: self.config.id.clone(),
                epoch: self.config.epoch,
                to_epoch,
                tokens: request.tokens,
                lease_ms: millis(lease),
                wait_ms: millis(self.config.wait),
                park_ms: if request.overlap {
                    millis(self.config.park)
                } else {
                    0
                },
                transport: transport.to_owned(),
            }),
        }
    }

    /// Notes the tokens that the engine's current step completes: their chunks may get send slots.
    pub(super) fn on_computing(&mut self, engine: EngineId, message: &Computing) {
        if let Some(request) = self.requests.get_mut(&message.req)
            && request.engine == Some(engine)
        {
            request.upto = request.upto.max(message.upto).min(request.tokens);
            request.progress = self.now;
        } else {
            self.kept_computing(engine, &message.req, message.upto);
        }
    }

    /// Marks chunks as gathered, and posts their write. For an LMCache receiver, asks for slots or
    /// waits for the chunks' event instead.
    pub(super) fn on_staged(&mut self, engine: EngineId, message: &Staged) {
        let Some(request) = self.requests.get_mut(&message.req) else {
            return;
        };
        if request.engine != Some(engine) {
            return;
        }
        request.progress = self.now;
        request.record.gather_us += message.gather_us;
        let after = message.event.map(|event| After { engine, event });
        // The GPU may still be gathering the chunks. LMCache's receivers show a key before its KV
        // is written, so the sender asks for the key only after the event has fired.
        let watch = after.map(|_| WatchId(self.next_watch));
        for &index in &message.chunks {
            let Some(chunk) = request.chunks.get_mut(index as usize) else {
                continue;
            };
            match *chunk {
                Chunk::Granted { from, to } => *chunk = Chunk::Staged { from, to },
                Chunk::Filling { from } => {
                    *chunk = match watch {
                        Some(watch) => Chunk::Gathering { from, watch },
                        None => Chunk::Full { from },
                    }
                }
                _ => {}
            }
        }
        // The sender must first get slots from an LMCache receiver. The sender posts the write when
        // the receiver's answer comes.
        if matches!(request.phase, Phase::Feeding(_)) {
            match after.zip(watch) {
                Some((after, watch)) => {
                    self.next_watch += 1;
                    self.actions.push_back(Action::Watch { watch, after });
                }
                None => self.on_full(&message.req),
            }
            return;
        }
        self.post(&message.req, after, message.layers.clone());
    }

    /// Ends a request that its engine cancels.
    pub(super) fn on_engine_cancel(&mut self, engine: EngineId, id: &RequestId) {
        if self
            .requests
            .get(id)
            .is_some_and(|r| r.engine == Some(engine))
        {
            self.end(id, Reason::Cancelled);
        } else {
            self.cancel_kept(engine, id);
        }
    }

    /// Ends all requests of an engine whose connection is lost.
    pub(super) fn on_engine_gone(&mut self, engine: EngineId) {
        let mine: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, r)| r.engine == Some(engine))
            .map(|(id, _)| id.clone())
            .collect();
        for id in mine {
            if let Some(request) = self.requests.get_mut(&id) {
                request.engine = None;
            }
            self.end(&id, Reason::EngineGone);
        }
        self.lose_kept(engine);
    }

    /// Notes the result of a handshake, and sends the alloc requests that waited for the handshake.
    pub(super) fn on_linked(&mut self, to: &Target, link: Link) {
        let epoch = match &link {
            Link::Up { epoch, .. } => Some(*epoch),
            Link::Lmcache(_) | Link::Making(_) => None,
        };
        self.links.insert(to.clone(), link);
        // If the receiver has restarted, the old leases belong to memory that no longer exists.
        let stale: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, r)| r.to == *to && r.lease().is_some_and(|l| Some(l.epoch) != epoch))
            .map(|(id, _)| id.clone())
            .collect();
        for id in stale {
            self.end(&id, Reason::StaleEpoch);
        }
        let waiting: Vec<RequestId> = self
            .requests
            .iter()
            .filter(|(_, r)| {
                r.to == *to && matches!(r.phase, Phase::Linking | Phase::Asking { .. })
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in waiting {
            if epoch.is_some() {
                self.ask(&id);
            } else {
                self.feed(&id);
            }
        }
    }
}

/// A lease lasts three heartbeats, so two lost heartbeats do not end the lease.
const HEARTBEATS_PER_LEASE: u32 = 3;

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
