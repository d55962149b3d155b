//! Who is there: registrations with a lease, verified by call-back.
//!
//! ```text
//!              Register(epoch)                  answer: same id and epoch
//!  (absent) ────────────────────▶ candidate ──────────────────────────────▶ member
//!                                     │                                       │
//!        3 missed periods, Leave, or  │                 3 missed periods,     │
//!        the answer names another     ▼                 Leave, or a candidate ▼
//!        id or epoch               (absent)             took its place     (absent)
//! ```
//!
//! A candidate never gets requests, and it replaces a member only once its admin address has
//! confirmed it: a stale or forged registration with a member's name changes nothing. A member
//! gets requests while its last answer said `ready` and is younger than 15 s.
//!
//! No IO and no clock here: the caller passes `now` and makes the calls that [`Registry::due`] names.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use protocol::registration::Register;

use crate::fleet::instance::{Instance, Standing, Unusable};

mod budget;
mod call;
mod command;
mod lease;

use budget::Budget;
pub(crate) use call::{Answer, CallBack};
pub(crate) use command::Command;
use lease::{Lease, holds_epoch, take_epoch};

/// Every registration.
#[derive(Debug)]
pub(crate) struct Registry {
    entries: BTreeMap<String, Entry>,
    max_instances: usize,
    call_back_every: Duration,
    budget: Budget,
    /// Names that two sidecars have, not said yet.
    disputes: Vec<String>,
}

/// Both registrations that one name can have.
#[derive(Debug, Default)]
struct Entry {
    member: Option<Lease>,
    candidate: Option<Lease>,
    /// Epoch of the member that a candidate has replaced last. A process that is gone does not come back
    /// with it.
    replaced: Option<u64>,
    /// Both are alive, each at an address of its own. Neither gets requests until one of them is gone.
    dispute: Option<String>,
}

/// What a registration did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registered {
    /// A name or epoch that was not known.
    New,
    /// A heartbeat.
    Renewed,
}

/// A registration that is not taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// A field cannot be used.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// The table is full.
    #[error("{0} instances are registered already (--max-instances)")]
    Full(usize),
    /// The addresses changed and the epoch did not.
    #[error("addresses or role changed within one epoch")]
    Changed,
    /// The name has two sidecars already.
    #[error("{0}")]
    Disputed(String),
}

impl Registry {
    /// An empty registry.
    pub(crate) fn new(max_instances: usize, call_back_every: Duration) -> Self {
        Self {
            entries: BTreeMap::new(),
            max_instances,
            call_back_every,
            budget: Budget::default(),
            disputes: Vec::new(),
        }
    }

    /// Takes a registration, which is its own heartbeat.
    ///
    /// # Errors
    /// Why it is not taken; the registry is unchanged.
    pub(crate) fn register(
        &mut self,
        now: Instant,
        message: &Register,
    ) -> Result<Registered, Refused> {
        let fresh = Instance::parse(message)?;
        let lease = Some(now + lease::announced(message));
        self.enter(now, fresh, lease, message.ready)
    }

    /// Takes an instance without a sidecar: with a lease that its next word renews, or for good.
    ///
    /// # Errors
    /// Why it is not taken; the registry is unchanged.
    pub(crate) fn name(
        &mut self,
        now: Instant,
        instance: Instance,
        lease: Option<Duration>,
    ) -> Result<Registered, Refused> {
        self.enter(now, instance, lease.map(|lease| now + lease), true)
    }

    fn enter(
        &mut self,
        now: Instant,
        fresh: Instance,
        expires: Option<Instant>,
        said_ready: bool,
    ) -> Result<Registered, Refused> {
        let full = self.entries.len() >= self.max_instances;
        if full && !self.entries.contains_key(&fresh.id) {
            return Err(Refused::Full(self.entries.len()));
        }
        let entry = self.entries.entry(fresh.id.clone()).or_default();
        let known = [entry.member.as_mut(), entry.candidate.as_mut()]
            .into_iter()
            .flatten()
            .find(|known| known.instance.epoch == fresh.epoch);
        let Some(known) = known else {
            if let Some(dispute) = &entry.dispute {
                return Err(Refused::Disputed(dispute.clone()));
            }
            entry.candidate = Some(Lease {
                call_at: self.budget.prompted(now, &fresh.id),
                instance: fresh,
                expires,
                calling: false,
                said_ready,
                answered: None,
            });
            return Ok(Registered::New);
        };
        if !known.instance.same_place(&fresh) {
            return Err(Refused::Changed);
        }
        known.instance.slots = fresh.slots;
        known.instance.free_slots = fresh.free_slots;
        known.instance.parked_tokens = fresh.parked_tokens;
        known.instance.kv = fresh.kv;
        known.expires = expires;
        if known.said_ready != said_ready {
            known.said_ready = said_ready;
            let prompted = self.budget.prompted(now, &fresh.id);
            // A change never puts off the call-back that is due anyway.
            known.call_at = known.call_at.min(prompted);
        }
        Ok(Registered::Renewed)
    }

    /// Takes a good-bye; returns whether anybody was meant.
    pub(crate) fn leave(&mut self, now: Instant, id: &str, epoch: u64) -> Option<Instance> {
        let entry = self.entries.get_mut(id)?;
        let gone = take_epoch(&mut entry.member, epoch)
            .or_else(|| take_epoch(&mut entry.candidate, epoch));
        self.tidy(now);
        gone.map(|lease| lease.instance)
    }

    /// Removes an instance, whatever its epoch; returns it if it was there.
    pub(crate) fn remove(&mut self, id: &str) -> Option<Instance> {
        let entry = self.entries.remove(id)?;
        entry.member.or(entry.candidate).map(|lease| lease.instance)
    }

    /// Lets an instance take no new requests, or take them again. Returns whether it is there.
    pub(crate) fn drain(&mut self, id: &str, draining: bool) -> bool {
        let Some(entry) = self.entries.get_mut(id) else {
            return false;
        };
        for lease in [&mut entry.member, &mut entry.candidate]
            .into_iter()
            .flatten()
        {
            lease.instance.draining = draining;
        }
        true
    }

    /// Drops what has not been heard of for three periods.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<Instance> {
        let mut gone = Vec::new();
        for entry in self.entries.values_mut() {
            for place in [&mut entry.member, &mut entry.candidate] {
                if place.as_ref().is_some_and(|lease| lease.has_expired(now)) {
                    gone.extend(place.take().map(|lease| lease.instance));
                }
            }
            if let Some(member) = &mut entry.member
                && member.answered.is_some_and(|at| at + ANSWER_VALID <= now)
                && member.instance.is_ready()
            {
                member.instance.standing = Standing::NotReady("no answer to call-backs".into());
            }
        }
        self.tidy(now);
        gone
    }

    /// Call-backs to be made now; each is under way until [`Registry::called_back`].
    pub(crate) fn due(&mut self, now: Instant) -> Vec<CallBack> {
        let mut calls = Vec::new();
        let Self {
            entries, budget, ..
        } = self;
        let leases = entries
            .values_mut()
            .flat_map(|entry| [&mut entry.member, &mut entry.candidate])
            .flatten();
        for lease in leases {
            if !lease.calling && lease.call_at <= now && budget.has_place(lease) {
                lease.calling = true;
                budget.begin(lease);
                calls.push(CallBack {
                    id: lease.instance.id.clone(),
                    epoch: lease.instance.epoch,
                    url: (lease.instance.admin.as_ref()).map(|admin| admin.join("/registered")),
                    health: lease.instance.http.join("/health"),
                });
            }
        }
        calls
    }

    /// A request has failed there: it is called back at once, or a second after the last call-back.
    pub(crate) fn suspect(&mut self, now: Instant, id: &str) {
        let member = self.entries.get_mut(id).and_then(|e| e.member.as_mut());
        if let Some(member) = member {
            // Not dropped: the last answer may be from just before the engine's death.
            let soon = member.answered.map_or(now, |at| now.max(at + RETRY_AFTER));
            member.call_at = member.call_at.min(soon);
        }
    }

    /// Takes the end of a call-back. Returns the instance if it changed its standing.
    pub(crate) fn called_back(
        &mut self,
        now: Instant,
        id: &str,
        epoch: u64,
        answer: Answer,
    ) -> Option<Instance> {
        let every = self.call_back_every;
        self.budget.end(id, epoch);
        let entry = self.entries.get_mut(id)?;
        let is_candidate = holds_epoch(&entry.candidate, epoch);
        if !is_candidate && !holds_epoch(&entry.member, epoch) {
            return None;
        }
        if answer == Answer::Stranger {
            let place = if is_candidate {
                &mut entry.candidate
            } else {
                &mut entry.member
            };
            let gone = place.take().map(|mut lease| {
                lease.instance.standing =
                    Standing::NotReady("another id or epoch answers at its admin address".into());
                lease.instance
            });
            self.tidy(now);
            return gone;
        }
        if is_candidate && entry.dispute.is_none() && matches!(answer, Answer::Confirmed { .. }) {
            if entry.replaced == Some(epoch) && entry.member.is_some() {
                self.disputes.extend(entry.open_dispute());
            } else {
                entry.replaced = entry.member.take().map(|lease| lease.instance.epoch);
                entry.member = entry.candidate.take();
            }
        }
        let place = if holds_epoch(&entry.member, epoch) {
            &mut entry.member
        } else {
            &mut entry.candidate
        };
        let lease = place.as_mut()?;
        lease.calling = false;
        let before = lease.instance.standing.clone();
        match answer {
            Answer::Confirmed { ready, reason } => {
                lease.call_at = now + every;
                lease.answered = Some(now);
                lease.instance.standing = if let Some(dispute) = &entry.dispute {
                    Standing::NotReady(dispute.clone())
                } else if ready {
                    Standing::Ready
                } else {
                    // A sidecar that is not ready is asked more often: it gets no requests meanwhile.
                    lease.call_at = now + RETRY_AFTER.min(every);
                    Standing::NotReady(reason)
                };
            }
            Answer::Silent(_) => lease.call_at = now + RETRY_AFTER.min(every),
            Answer::Stranger => {}
        }
        (before != lease.instance.standing).then(|| lease.instance.clone())
    }

    /// When [`Registry::expire`] or [`Registry::due`] has something to do next.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.entries
            .values()
            .flat_map(|entry| [&entry.member, &entry.candidate])
            .flatten()
            .flat_map(|lease| {
                let stale = lease
                    .answered
                    .filter(|_| lease.instance.is_ready())
                    .map(|at| at + ANSWER_VALID);
                // A call-back without a place waits for the end of another one, not for an instant.
                let may_call = !lease.calling && self.budget.has_place(lease);
                let call = may_call.then_some(lease.call_at);
                [lease.expires, stale, call].into_iter().flatten()
            })
            .min()
    }

    /// Every instance, members before candidates of the same name.
    pub(crate) fn instances(&self) -> Vec<Instance> {
        self.entries
            .values()
            .flat_map(|entry| [&entry.member, &entry.candidate])
            .flatten()
            .map(|lease| lease.instance.clone())
            .collect()
    }

    /// Takes what is to be said of names that two sidecars have, each dispute once.
    pub(crate) fn disputes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.disputes)
    }

    /// Forgets names without registration, and ends disputes that one side has left.
    fn tidy(&mut self, now: Instant) {
        self.entries
            .retain(|_, entry| entry.member.is_some() || entry.candidate.is_some());
        for entry in self.entries.values_mut() {
            entry.settle(now);
        }
    }
}

impl Entry {
    /// Uses neither of both from now on. Returns what is to be said.
    fn open_dispute(&mut self) -> Option<String> {
        let (member, candidate) = (self.member.as_mut()?, self.candidate.as_mut()?);
        let place = |lease: &Lease| {
            let admin = lease.instance.admin.as_ref();
            admin.unwrap_or(&lease.instance.http).to_string()
        };
        let dispute = format!(
            "two sidecars have the id {:?}: {} and {}; neither is used until one stops or gets another --id",
            member.instance.id,
            place(member),
            place(candidate)
        );
        for lease in [member, candidate] {
            lease.instance.standing = Standing::NotReady(dispute.clone());
        }
        self.dispute = Some(dispute.clone());
        Some(dispute)
    }

    /// Ends a dispute once one side is gone: the other side is called back, and used if it answers.
    fn settle(&mut self, now: Instant) {
        if self.dispute.is_some() && (self.member.is_none() || self.candidate.is_none()) {
            self.dispute = None;
            self.replaced = None;
            for lease in [&mut self.member, &mut self.candidate]
                .into_iter()
                .flatten()
            {
                lease.call_at = now;
            }
        }
    }
}

/// After a call-back without an answer, or with the answer "not ready".
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// A `ready` that has not been repeated for so long does not count. The sidecar, on its side, is not
/// ready without an acknowledgement of the same age.
pub(crate) const ANSWER_VALID: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
