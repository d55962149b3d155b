//! Handles KV that the engine keeps in its own blocks until a decode side fetches the KV.
//!
//! A router that names no receiver sends the decode request after the prefill request has ended.
//! Meanwhile the engine keeps the KV, and a token names the KV. The decode side's sidecar sends
//! this token when it asks for the KV.
//!
//! ```text
//!  Keep ──▶ Kept ──Fetch──▶ Fetched: a request to the fetching receiver, like any other
//!            ▲ │               │  every chunk written, or failed under a lease: ended
//!            │ │ deadline,     │
//!            │ │ Drop, Cancel  │
//!            │ ▼               │
//!            │ ended           │
//!            └──── no lease ───┘
//! ```
//!
//! * Kept KV has no send slot. A chunk gets a send slot only after a receiver with a parked request
//!   has opened a landing slot for it. So two requests never wait for each other's slots.
//! * If a fetch fails before its lease, the KV is kept again, because the decode request may be
//!   sent a second time. If a fetch fails after its lease, the KV ends: the engine may be gathering
//!   into granted slots, and the sender could take a late `Staged` for a `Staged` of the next
//!   fetch.
//! * For a message with an unknown token, the sender stores nothing and contacts no address.
//! * No KV is kept longer than [`Config::max_keep`](super::Config::max_keep) after it is computed,
//!   even if it is renewed. Without this limit, two engines that keep KV for each other could wait
//!   for ever.

mod store;

use std::collections::BTreeSet;
use std::time::Duration;

use self::store::Kept;
pub use self::store::KeptRequest;
pub(super) use self::store::Store;
use super::request::{Fetched, Phase, Request, Term};
use super::{Action, FetcherId, Sender};
use crate::keep::{Fetch, Gone, OfToken, ToFetcher, ToKeeper};
use crate::local::{Keep, Reserve};
use crate::record::Record;
use crate::{EngineId, Epoch, Reason, RequestId, Token, VERSION};

impl Sender {
    /// Begins to keep the KV of a request, or keeps it for longer.
    pub(super) fn on_keep(&mut self, engine: EngineId, asked: Keep) {
        let now = self.now;
        let term = self.term(asked.keep_ms, asked.upto >= asked.tokens);
        if let Some(kept) = self.store.kept.get_mut(&asked.token)
            && kept.engine == engine
            && kept.req == asked.req
        {
            kept.upto = kept.upto.max(asked.upto).min(kept.tokens);
            kept.term.deadline = (now + kept.term.keep).min(kept.term.limit);
            return;
        }
        if self.store.fetched.get(&asked.token) == Some(&asked.req) {
            return; // a repetition; the KV is being fetched already
        }
        self.set_aside(&asked.req);
        if let Err(reason) = self.admit_keep(&asked) {
            self.tell_ended(engine, &asked.req, Some(reason), 0);
            // The answer with the token may be in flight already. If the decode side then asks, it
            // gets the reason.
            if reason != Reason::Duplicate && asked.token.is_sound() {
                self.store.bury(asked.token, reason);
            }
            let mut record = Record::new(asked.req);
            (record.tokens, record.reason) = (asked.tokens, Some(reason));
            self.actions.push_back(Action::Record(record));
            return;
        }
        // After a failed push, the engine may keep the same KV again.
        self.store.ended.retain(|(token, _)| *token != asked.token);
        let kept = Kept {
            engine,
            req: asked.req,
            keys: asked.keys,
            tokens: asked.tokens,
            upto: asked.upto.min(asked.tokens),
            term,
            renewers: BTreeSet::new(),
        };
        self.store.insert(asked.token, kept);
    }

    /// Checks whether KV can be kept, and returns the reason if it cannot.
    fn admit_keep(&self, asked: &Keep) -> Result<(), Reason> {
        let chunks = self.chunking.plan(asked.tokens, 0).chunks() as usize;
        if self.config.push_off {
            Err(Reason::PushOff)
        } else if self.draining {
            Err(Reason::Draining)
        } else if asked.req.0.is_empty()
            || !asked.token.is_sound()
            || asked.keys.is_empty()
            || chunks != asked.keys.len()
        {
            Err(Reason::BadRequest)
        } else if self.requests.contains_key(&asked.req)
            || self.store.has(&asked.req)
            || self.store.kept.contains_key(&asked.token)
            || self.store.fetched.contains_key(&asked.token)
        {
            Err(Reason::Duplicate)
        } else if self.store.kept.len() >= self.config.max_requests {
            Err(Reason::Busy)
        } else {
            Ok(())
        }
    }

    /// Returns the time for which KV is kept, beginning now. While the engine still computes the
    /// prompt, only the limit counts, because a preempted request may wait for a long time.
    fn term(&self, keep_ms: u32, complete: bool) -> Term {
        let keep = Duration::from_millis(u64::from(keep_ms)).min(self.config.max_keep);
        let limit = self.now + self.config.max_keep;
        let deadline = if complete { self.now + keep } else { limit };
        Term {
            keep,
            deadline,
            limit,
        }
    }

    /// Notes that the engine computes tokens of kept KV. The time for which the KV is kept begins
    /// when all tokens are computed.
    pub(super) fn kept_computing(&mut self, engine: EngineId, req: &RequestId, upto: u32) {
        let (now, max_keep) = (self.now, self.config.max_keep);
        self.store.changes += 1;
        let mut kept = self.store.kept.values_mut();
        if let Some(kept) = kept.find(|k| k.engine == engine && k.req == *req) {
            kept.upto = kept.upto.max(upto).min(kept.tokens);
            kept.term.limit = now + max_keep;
            kept.term.deadline = if kept.upto < kept.tokens {
                kept.term.limit
            } else {
                now + kept.term.keep
            };
        }
    }

    /// Ends the kept KV of a request that the engine cancels.
    pub(super) fn cancel_kept(&mut self, engine: EngineId, req: &RequestId) {
        if let Some(token) = self.store.token_of(engine, req) {
            self.end_kept(&token, Reason::Cancelled);
        }
    }

    /// Ends all kept KV of an engine whose connection is lost.
    pub(super) fn lose_kept(&mut self, engine: EngineId) {
        let mine = |(_, k): &(&Token, &Kept)| k.engine == engine;
        let tokens: Vec<Token> = self
            .store
            .kept
            .iter()
            .filter(mine)
            .map(|(token, _)| token.clone())
            .collect();
        for token in tokens {
            self.end_kept(&token, Reason::EngineGone);
        }
    }

    /// Ends all kept KV that no decode side has fetched in time.
    pub(super) fn expire_kept(&mut self) {
        let now = self.now;
        let due: Vec<(Token, Reason)> = self
            .store
            .kept
            .iter()
            .filter(|(_, k)| k.term.deadline <= now)
            .map(|(token, k)| {
                // A decode request that has renewed the KV until the limit still waits for it.
                let waits = k.term.limit <= now && !k.renewers.is_empty();
                let reason = if waits {
                    Reason::Deadline
                } else {
                    Reason::Unclaimed
                };
                (token.clone(), reason)
            })
            .collect();
        for (token, reason) in due {
            self.end_kept(&token, reason);
        }
    }

    /// Ends kept KV, so that the engine may reuse its blocks.
    fn end_kept(&mut self, token: &Token, reason: Reason) {
        let Some(kept) = self.store.remove(token) else {
            return;
        };
        self.store.bury(token.clone(), reason);
        if reason != Reason::EngineGone {
            self.tell_ended(kept.engine, &kept.req, Some(reason), 0);
        }
        let mut record = Record::new(kept.req);
        (record.tokens, record.reason) = (kept.tokens, Some(reason));
        self.actions.push_back(Action::Record(record));
    }

    /// Handles a message of a decode side's sidecar.
    pub(super) fn on_fetcher(&mut self, from: FetcherId, message: ToKeeper) {
        match message {
            ToKeeper::Fetch(fetch) => self.on_fetch(from, fetch),
            ToKeeper::Renew(renew) => self.on_renew(from, renew),
            ToKeeper::Drop(drop) => self.on_drop(&drop),
        }
    }

    fn on_fetch(&mut self, from: FetcherId, fetch: Fetch) {
        if let Err(reason) = self.check(fetch.v, fetch.epoch) {
            return self.gone(from, fetch.token, fetch.req, reason);
        }
        if let Some(id) = self.store.fetched.get(&fetch.token) {
            let request = self.requests.get_mut(id);
            let same = request.filter(|r| r.record.req == fetch.req && r.to == fetch.to);
            match same.and_then(|r| r.fetched.as_mut()) {
                // A repetition: the sender is already asking the receiver for slots. The decode side
                // may have connected again.
                Some(fetched) => fetched.by = from,
                None => self.later(from, fetch.token, fetch.req, Reason::Duplicate),
            }
            return;
        }
        if self.store.kept.contains_key(&fetch.token)
            && self.requests.len() >= self.config.max_requests
        {
            return self.later(from, fetch.token, fetch.req, Reason::Busy);
        }
        match self.store.remove(&fetch.token) {
            Some(kept) => self.start_fetch(from, fetch, kept),
            None => {
                let reason = self.store.end_of(&fetch.token);
                self.gone(from, fetch.token, fetch.req, reason);
            }
        }
    }

    /// Turns kept KV into a request to the receiver that fetches it. The messages to the receiver
    /// have the decode side's id, and the messages to the engine have the engine's id.
    fn start_fetch(&mut self, from: FetcherId, fetch: Fetch, kept: Kept) {
        let id = kept.req.clone();
        // An earlier fetch under this id may have ended without its receiver's answer, and may
        // still wait for this answer.
        self.set_aside(&id);
        let reserve = Reserve {
            req: kept.req,
            to: fetch.to,
            keys: kept.keys,
            tokens: kept.tokens,
            upto: kept.upto,
            overlap: false,
        };
        let mut request = Request::new(kept.engine, reserve, self.next_order, self.now);
        self.next_order += 1;
        request.record.req = fetch.req;
        request.unannounced = true;
        request.fetched = Some(Fetched {
            token: fetch.token.clone(),
            by: from,
            term: kept.term,
        });
        self.requests.insert(id.clone(), request);
        self.store.fetched.insert(fetch.token, id.clone());
        self.start(&id);
    }

    fn on_renew(&mut self, from: FetcherId, renew: OfToken) {
        let now = self.now;
        if let Err(reason) = self.check(renew.v, renew.epoch) {
            return self.gone(from, renew.token, renew.req, reason);
        }
        if self.store.fetched.contains_key(&renew.token) {
            return;
        }
        let Some(kept) = self.store.kept.get_mut(&renew.token) else {
            let reason = self.store.end_of(&renew.token);
            return self.gone(from, renew.token, renew.req, reason);
        };
        if kept.renewers.len() < MAX_RENEWERS {
            kept.renewers.insert(renew.req);
        }
        if kept.upto >= kept.tokens {
            kept.term.deadline = (now + kept.term.keep).min(kept.term.limit);
        }
    }

    /// Ends KV that a decode request does not need, unless another decode request waits for the KV.
    fn on_drop(&mut self, drop: &OfToken) {
        if self.check(drop.v, drop.epoch).is_err() {
            return;
        }
        if let Some(id) = self.store.fetched.get(&drop.token).cloned() {
            // After the lease the receiver itself sends `Unwanted` for the rest.
            let asks = self.requests.get(&id).is_some_and(|r| {
                r.record.req == drop.req && matches!(r.phase, Phase::Linking | Phase::Asking { .. })
            });
            if asks && let Some(request) = self.requests.get_mut(&id) {
                // Set the deadline of the KV to now. The KV then ends together with the request,
                // and is not kept again.
                if let Some(fetched) = &mut request.fetched {
                    fetched.term.deadline = self.now;
                }
                self.end(&id, Reason::Unwanted);
            }
            return;
        }
        let Some(kept) = self.store.kept.get_mut(&drop.token) else {
            return;
        };
        kept.renewers.remove(&drop.req);
        if kept.renewers.is_empty() {
            self.end_kept(&drop.token, Reason::Unwanted);
        }
    }

    /// Notes the end of a request that served a fetch. Returns true if the engine keeps the KV: the
    /// engine has got no message about the fetch yet, and another decode request may still come.
    pub(super) fn end_fetched(&mut self, id: &RequestId, reason: Option<Reason>) -> bool {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return false;
        };
        let Some(fetched) = request.fetched.take() else {
            return false;
        };
        let asks = matches!(request.phase, Phase::Linking | Phase::Asking { .. });
        let req = request.record.req.clone();
        self.store.fetched.remove(&fetched.token);
        let recoverable = reason.is_some_and(|reason| !is_final(reason));
        let keeps = asks && recoverable && fetched.term.deadline > now;
        if keeps && let Some(engine) = request.engine.take() {
            let kept = Kept {
                engine,
                req: id.clone(),
                keys: request.keys.clone(),
                tokens: request.tokens,
                upto: request.upto,
                term: fetched.term,
                renewers: BTreeSet::new(),
            };
            request.record.reason = reason;
            let record = request.record.clone();
            self.store.insert(fetched.token.clone(), kept);
            self.actions.push_back(Action::Record(record));
            self.gone(
                fetched.by,
                fetched.token,
                req,
                reason.unwrap_or(Reason::NotKept),
            );
            return true;
        }
        // If the KV was delivered, a later fetch of this token can only be a repetition.
        let end = reason.unwrap_or(Reason::Duplicate);
        self.store.bury(fetched.token.clone(), end);
        if asks && let Some(reason) = reason {
            self.gone(fetched.by, fetched.token, req, reason);
        }
        false
    }

    /// Checks that a message has this protocol version, and that it is for the present epoch of
    /// this sidecar.
    fn check(&self, v: u32, epoch: Epoch) -> Result<(), Reason> {
        if v != VERSION {
            Err(Reason::VersionMismatch)
        } else if epoch != ANY_EPOCH && epoch != self.config.epoch {
            Err(Reason::StaleEpoch)
        } else {
            Ok(())
        }
    }

    fn gone(&mut self, to: FetcherId, token: Token, req: RequestId, reason: Reason) {
        self.answer(to, token, req, reason, 0);
    }

    /// Answers that a repetition of the message may succeed.
    fn later(&mut self, to: FetcherId, token: Token, req: RequestId, reason: Reason) {
        let retry_ms = u32::try_from(self.config.repeat.as_millis()).unwrap_or(u32::MAX);
        self.answer(to, token, req, reason, retry_ms.max(1));
    }

    fn answer(
        &mut self,
        to: FetcherId,
        token: Token,
        req: RequestId,
        reason: Reason,
        retry_ms: u32,
    ) {
        let message = ToFetcher::Gone(Gone {
            v: VERSION,
            token,
            req,
            reason,
            retry_ms,
        });
        self.actions.push_back(Action::Answer { to, message });
    }
}

/// Returns true if no other receiver could take the KV after a fetch that ended for this reason.
fn is_final(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::Cancelled
            | Reason::EngineGone
            | Reason::KeyMismatch
            | Reason::LayoutMismatch
            | Reason::VersionMismatch
            | Reason::BadRequest
    )
}

/// Epoch in messages of decode sides that do not know it.
const ANY_EPOCH: Epoch = Epoch(0);
/// Maximum number of decode requests that the sender notes as renewers of one token. A client
/// request has few retries and choices.
const MAX_RENEWERS: usize = 8;
