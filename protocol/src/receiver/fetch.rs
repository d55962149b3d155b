//! KV that waits at a prefill side until the decode engine has blocks for it.
//!
//! ```text
//!  Expect ──▶ Queued ──Await──▶ Parked ──lease──▶ a request like any other
//!               │ Renew           │ Fetch, repeated
//!               │ Abort: Drop     │ Abort, deadline, no sender: Drop
//!               ▼                 ▼ Gone: the request ends
//!              Gone ──Await──▶ the request ends at once
//! ```
//!
//! When the receiver grants a lease, it forgets the fetch: after this the lease identifies the
//! hand-over. Every message of a fetch may be lost. If a `Drop` is lost, the prefill side keeps the
//! KV until its time ends.

use std::collections::BTreeMap;
use std::time::Duration;

use super::request::{Allocation, Request};
use super::{Action, Receiver};
use crate::keep::{Fetch, Gone, OfToken, ToFetcher, ToKeeper};
use crate::local::{Expect, Keeper};
use crate::{EngineId, Epoch, Reason, RequestId, Time, Token, VERSION};

/// Decode requests whose KV waits at a prefill side, by their ids.
#[derive(Debug, Default)]
pub(super) struct Fetches {
    expected: BTreeMap<RequestId, Expected>,
}

/// One decode request whose KV waits.
#[derive(Debug)]
struct Expected {
    engine: EngineId,
    token: Token,
    from: Keeper,
    epoch: Epoch,
    /// Time between two `Renew`.
    renew: Duration,
    /// Time after which the receiver forgets a request that does not park.
    until: Time,
    stage: Stage,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    /// The request waits in its engine's queue; the next `Renew` is due at this time.
    Queued { next: Time },
    /// The request is parked; the next `Fetch` is due at this time.
    Parked { next: Time },
    /// The prefill side does not have the KV any more.
    Gone(Reason),
}

impl Fetches {
    /// Returns the time at which the next message is due.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.expected.values().map(Expected::deadline).min()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.expected.is_empty()
    }

    /// Returns the number of requests whose KV waits.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.expected.len()).unwrap_or(u32::MAX)
    }

    /// Forgets a request whose KV is being pushed.
    pub(super) fn forget(&mut self, id: &RequestId) {
        self.expected.remove(id);
    }
}

impl Receiver {
    /// Begins to renew the KV of a request that its engine has queued.
    pub(super) fn on_expect(&mut self, engine: EngineId, message: Expect) {
        let now = self.now;
        let id = message.req;
        let known = self.fetches.expected.get(&id);
        let same = known.is_some_and(|e| e.engine == engine && e.token == message.token);
        // A parked request needs no `Renew`. If the receiver has no address, no sender can write to
        // it.
        let is_late = self.requests.get(&id).is_some_and(|r| r.parked.is_some());
        let full = self.fetches.expected.len() >= self.config.max_requests * EXPECTED_PER_REQUEST;
        if same
            || is_late
            || id.0.is_empty()
            || !message.token.is_sound()
            || self.config.address.is_none()
            || (known.is_none() && full)
        {
            return;
        }
        self.drop_expected(&id);
        let keep = Duration::from_millis(u64::from(message.keep_ms));
        let renew = (keep / RENEWALS_PER_TERM).max(MIN_RENEW);
        let expected = Expected {
            engine,
            token: message.token,
            from: message.from,
            epoch: message.epoch,
            renew,
            until: now + self.config.max_expect,
            stage: Stage::Queued { next: now + renew },
        };
        self.fetches.expected.insert(id.clone(), expected);
        // If the KV is gone, the prefill side answers, and the receiver knows this before the
        // request parks.
        self.send_renew(&id);
    }

    /// Returns the reason why the prefill side does not have the KV any more, and forgets the
    /// request; `None` if the prefill side may still have the KV.
    pub(super) fn take_gone(&mut self, id: &RequestId) -> Option<Reason> {
        let Stage::Gone(reason) = self.fetches.expected.get(id)?.stage else {
            return None;
        };
        self.fetches.forget(id);
        Some(reason)
    }

    /// Asks the prefill side to push the KV of a parked request, if the KV waits at a prefill side.
    pub(super) fn fetch(&mut self, id: &RequestId) {
        let next = self.now + REPEAT;
        if let Some(expected) = self.fetches.expected.get_mut(id) {
            expected.stage = Stage::Parked { next };
            self.send_fetch(id);
        }
    }

    fn send_fetch(&mut self, id: &RequestId) {
        let (Some(expected), Some(to)) = (self.fetches.expected.get(id), &self.config.address)
        else {
            return;
        };
        let message = ToKeeper::Fetch(Fetch {
            v: VERSION,
            token: expected.token.clone(),
            epoch: expected.epoch,
            req: id.clone(),
            to: to.clone(),
        });
        let to = expected.from.clone();
        self.actions.push_back(Action::Ask { to, message });
    }

    fn send_renew(&mut self, id: &RequestId) {
        if let Some(expected) = self.fetches.expected.get(id) {
            let message = ToKeeper::Renew(expected.of_token(id));
            let to = expected.from.clone();
            self.actions.push_back(Action::Ask { to, message });
        }
    }

    /// Tells the prefill side that a request does not need its KV, and forgets the request.
    pub(super) fn drop_expected(&mut self, id: &RequestId) {
        let Some(expected) = self.fetches.expected.remove(id) else {
            return;
        };
        if !matches!(expected.stage, Stage::Gone(_)) {
            let message = ToKeeper::Drop(expected.of_token(id));
            let to = expected.from;
            self.actions.push_back(Action::Ask { to, message });
        }
    }

    /// Drops the KV of all requests of an engine whose connection is lost.
    pub(super) fn lose_expected(&mut self, engine: EngineId) {
        let mine = self.fetches.expected.iter();
        let mine: Vec<RequestId> = mine
            .filter(|(_, e)| e.engine == engine)
            .map(|(id, _)| id.clone())
            .collect();
        for id in mine {
            self.drop_expected(&id);
        }
    }

    /// Handles a message of a prefill side's sidecar.
    pub(super) fn on_keeper(&mut self, from: &Keeper, message: &ToFetcher) {
        let ToFetcher::Gone(Gone {
            token,
            req,
            reason,
            retry_ms,
            ..
        }) = message;
        let Some(expected) = self.fetches.expected.get_mut(req) else {
            return;
        };
        if expected.token != *token || expected.from != *from {
            return;
        }
        match (expected.stage, *retry_ms) {
            (Stage::Queued { .. }, 0) => expected.stage = Stage::Gone(*reason),
            (Stage::Parked { .. }, 0) => self.end_fetch(&req.clone(), *reason),
            (Stage::Parked { .. }, retry_ms) => {
                let wait = Duration::from_millis(u64::from(retry_ms)).max(MIN_RETRY);
                let next = self.now + wait;
                expected.stage = Stage::Parked { next };
            }
            (Stage::Queued { .. } | Stage::Gone(_), _) => {}
        }
    }

    /// Ends the parked requests whose prefill side cannot be reached. For queued requests the
    /// receiver tries again when they park.
    pub(super) fn on_keeper_lost(&mut self, from: &Keeper, reason: Reason) {
        let parked = self.fetches.expected.iter();
        let parked: Vec<RequestId> = parked
            .filter(|(_, e)| e.from == *from && matches!(e.stage, Stage::Parked { .. }))
            .map(|(id, _)| id.clone())
            .collect();
        for id in parked {
            self.end_fetch(&id, reason);
        }
    }

    /// Ends a parked request whose KV does not come. The prefill side needs no `Drop`, because it
    /// has no KV, keeps the KV for another decode request, or cannot be reached.
    fn end_fetch(&mut self, id: &RequestId, reason: Reason) {
        self.fetches.forget(id);
        let asked = |r: &Request| !matches!(r.allocation, Allocation::None);
        // If a sender has already asked for slots, the message belongs to an earlier fetch.
        if !self.requests.get(id).is_some_and(asked) {
            self.end_parked(id, reason, true);
        }
    }

    /// Repeats the messages that are due, and forgets requests that do not park.
    pub(super) fn on_fetch_deadlines(&mut self) {
        let now = self.now;
        let expected = self.fetches.expected.iter();
        let due: Vec<RequestId> = expected
            .filter(|(_, e)| e.deadline() <= now)
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            let Some(expected) = self.fetches.expected.get_mut(&id) else {
                continue;
            };
            match &mut expected.stage {
                Stage::Queued { .. } | Stage::Gone(_) if expected.until <= now => {
                    self.drop_expected(&id);
                }
                Stage::Queued { next } if *next <= now => {
                    *next = now + expected.renew;
                    self.send_renew(&id);
                }
                Stage::Parked { next } if *next <= now => {
                    *next = now + REPEAT;
                    self.send_fetch(&id);
                }
                Stage::Queued { .. } | Stage::Parked { .. } | Stage::Gone(_) => {}
            }
        }
    }
}

impl Expected {
    /// Returns the time at which the next message or the end is due.
    fn deadline(&self) -> Time {
        match self.stage {
            Stage::Queued { next } => next.min(self.until),
            Stage::Parked { next } => next,
            Stage::Gone(_) => self.until,
        }
    }

    fn of_token(&self, id: &RequestId) -> OfToken {
        OfToken {
            v: VERSION,
            token: self.token.clone(),
            epoch: self.epoch,
            req: id.clone(),
        }
    }
}

/// Time after which a `Fetch` without an answer is repeated.
const REPEAT: Duration = Duration::from_millis(500);
/// Number of renewals in the time for which KV is kept. With three renewals, the KV survives the
/// loss of two.
const RENEWALS_PER_TERM: u32 = 3;
/// Shortest time between two renewals, whatever the request's parameters say.
const MIN_RENEW: Duration = Duration::from_millis(100);
/// Shortest time until a `Fetch` that was answered with `retry_ms` is repeated.
const MIN_RETRY: Duration = Duration::from_millis(50);
/// Maximum number of expected requests, as a multiple of `max_requests`. An engine can have more
/// queued requests than parked requests.
const EXPECTED_PER_REQUEST: usize = 4;
