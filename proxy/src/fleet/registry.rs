//! Registrations with a lease, which the proxy verifies by call-back.
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
//! A candidate never gets requests. A candidate replaces a member only after a call-back has confirmed the
//! candidate at its admin address, so a stale or forged registration with a member's name changes nothing. A
//! member gets requests only if its last answer said `ready` and is less than 15 s old.
//!
//! The registry does no IO and reads no clock: the caller passes `now` and makes the call-backs that
//! [`Registry::due`] returns.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use protocol::registration::Register;

use crate::fleet::instance::{Instance, Standing, Unusable};
use crate::fleet::models::Models;

mod budget;
mod call;
mod command;
mod lease;

use budget::Budget;
pub(crate) use call::{Answer, CallBack};
pub(crate) use command::Command;
use lease::{Lease, holds_epoch, take_epoch};

/// All registrations, by id.
#[derive(Debug)]
pub(crate) struct Registry {
    /// The registrations of each id: the member and the candidate.
    entries: BTreeMap<String, Entry>,
    /// Maximum number of ids; the registry refuses further ids.
    max_instances: usize,
    /// Time between two call-backs of an instance that answers.
    call_back_every: Duration,
    budget: Budget,
    /// Disputes over ids that have not been logged yet.
    disputes: Vec<String>,
}

/// The member and the candidate of one id.
#[derive(Debug, Default)]
struct Entry {
    member: Option<Lease>,
    candidate: Option<Lease>,
    /// Epoch of the last member that a candidate replaced. A process that has ended never registers again
    /// with its epoch. So if a candidate with this epoch is confirmed, two live sidecars have the same id.
    replaced: Option<u64>,
    /// Text of the dispute while two live sidecars have this id; neither sidecar gets requests. `None`
    /// without a dispute.
    dispute: Option<String>,
}

/// The effect of a registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registered {
    /// The id or epoch is new.
    New,
    /// The registration renews a lease: a heartbeat.
    Renewed,
}

/// A registration that the registry refuses.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    /// A field cannot be used.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// The registry is full.
    #[error("{0} instances are already registered, which is the limit (--max-instances)")]
    Full(usize),
    /// The addresses or the role changed, although the epoch stayed the same.
    #[error("the addresses or the role changed within one epoch")]
    Changed,
    /// Two live sidecars have the id already.
    #[error("{0}")]
    Disputed(String),
}

impl Registry {
    /// Creates an empty registry.
    pub(crate) fn new(max_instances: usize, call_back_every: Duration) -> Self {
        Self {
            entries: BTreeMap::new(),
            max_instances,
            call_back_every,
            budget: Budget::default(),
            disputes: Vec::new(),
        }
    }

    /// Handles a registration message of a sidecar. Each registration is also a heartbeat.
    ///
    /// # Errors
    /// The registry refuses the instance and stays unchanged. The error gives the reason.
    pub(crate) fn register(
        &mut self,
        now: Instant,
        message: &Register,
    ) -> Result<Registered, Refused> {
        let fresh = Instance::parse(message)?;
        let lease = Some(now + lease::announced(message));
        self.enter(now, fresh, lease, message.ready)
    }

    /// Registers an instance without a sidecar. The instance stays for `lease` after its last registration.
    /// Without a lease, the instance stays until it is removed.
    ///
    /// # Errors
    /// The registry refuses the instance and stays unchanged. The error gives the reason.
    pub(crate) fn name(
        &mut self,
        now: Instant,
        instance: Instance,
        lease: Option<Duration>,
    ) -> Result<Registered, Refused> {
        self.enter(now, instance, lease.map(|lease| now + lease), true)
    }

    /// Renews a known registration, or makes a new registration the candidate of its id.
    fn enter(
        &mut self,
        now: Instant,
        fresh: Instance,
        expires: Option<Instant>,
        said_ready: bool,
    ) -> Result<Registered, Refused> {
        // Only a new id needs room: the registry accepts heartbeats of known instances even when it is
        // full.
        let full = self.entries.len() >= self.max_instances;
        if full && !self.entries.contains_key(&fresh.id) {
            return Err(Refused::Full(self.entries.len()));
        }
        let entry = self.entries.entry(fresh.id.clone()).or_default();
        // A registration with a known epoch is a heartbeat; a registration with a new epoch becomes the
        // candidate.
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
                trouble: String::new(),
            });
            return Ok(Registered::New);
        };
        // Without this check, a forged heartbeat could redirect the requests of a confirmed instance.
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
            // A change of readiness must not delay a call-back that is due earlier.
            known.call_at = known.call_at.min(prompted);
        }
        Ok(Registered::Renewed)
    }

    /// Removes the registration of this id and epoch, and returns its instance if it was registered.
    pub(crate) fn leave(&mut self, now: Instant, id: &str, epoch: u64) -> Option<Instance> {
        let entry = self.entries.get_mut(id)?;
        let gone = take_epoch(&mut entry.member, epoch)
            .or_else(|| take_epoch(&mut entry.candidate, epoch));
        self.tidy(now);
        gone.map(|lease| lease.instance)
    }

    /// Removes the instance of this id with any epoch, and returns it if it was registered.
    pub(crate) fn remove(&mut self, id: &str) -> Option<Instance> {
        let entry = self.entries.remove(id)?;
        entry.member.or(entry.candidate).map(|lease| lease.instance)
    }

    /// Drains an instance, or gives it requests again. Returns true if it is registered.
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

    /// Does not count the last `asleep` in any lease: the proxy did not run in this time, so it could not hear anyone.
    /// Heartbeats that came meanwhile are read afterwards.
    pub(crate) fn slept(&mut self, asleep: Duration) {
        let leases = self
            .entries
            .values_mut()
            .flat_map(|entry| [&mut entry.member, &mut entry.candidate])
            .flatten();
        for lease in leases {
            for time in [&mut lease.expires, &mut lease.answered] {
                *time = time.map(|at| at + asleep);
            }
        }
    }

    /// Removes registrations with an expired lease and returns their instances. Marks members as not
    /// ready if their last answer is too old.
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

    /// Returns the call-backs that are due. Each call-back counts as in flight until
    /// [`Registry::called_back`] gets the call-back's result.
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
                    models: (!lease.instance.models.is_configured())
                        .then(|| lease.instance.http.join("/v1/models")),
                });
            }
        }
        calls
    }

    /// Schedules a call-back after a request to the instance has failed: at once, or one second after
    /// the last answer.
    pub(crate) fn suspect(&mut self, now: Instant, id: &str) {
        let member = self.entries.get_mut(id).and_then(|e| e.member.as_mut());
        if let Some(member) = member {
            // The call-back is necessary even after a very recent answer: the engine may have died after
            // this answer.
            let soon = member.answered.map_or(now, |at| now.max(at + RETRY_AFTER));
            member.call_at = member.call_at.min(soon);
        }
    }

    /// Handles the result of a call-back. Returns the instance if its readiness changed or if the result
    /// removed it.
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
        // The registration may have ended while its call-back was in flight.
        if !is_candidate && !holds_epoch(&entry.member, epoch) {
            return None;
        }
        // Another process has the instance's address now, so requests for the instance must no longer go to
        // the address.
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
        // A confirmed candidate replaces the member, unless the two would replace each other forever.
        if is_candidate && entry.dispute.is_none() && matches!(answer, Answer::Confirmed { .. }) {
            if entry.replaced == Some(epoch) && entry.member.is_some() {
                self.disputes.extend(entry.open_dispute());
            } else {
                entry.replaced = entry.member.take().map(|lease| lease.instance.epoch);
                entry.member = entry.candidate.take();
            }
        }
        // A confirmed candidate may have become the member in the lines above.
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
                lease.trouble.clear();
                lease.call_at = now + every;
                lease.answered = Some(now);
                lease.instance.standing = if let Some(dispute) = &entry.dispute {
                    Standing::NotReady(dispute.clone())
                } else if ready {
                    Standing::Ready
                } else {
                    // The proxy calls back more often while a sidecar is not ready, because the sidecar
                    // gets no requests before its next answer.
                    lease.call_at = now + RETRY_AFTER.min(every);
                    Standing::NotReady(reason)
                };
            }
            Answer::Silent(why) => {
                lease.call_at = now + RETRY_AFTER.min(every);
                lease.trouble = format!("the call-back failed: {why}");
            }
            Answer::Stranger => {}
        }
        (before != lease.instance.standing).then(|| lease.instance.clone())
    }

    /// Returns true if a call-back has confirmed the registration lately, and otherwise the reason why not; the reason is
    /// empty if no call-back has ended yet.
    pub(crate) fn confirmation(&self, now: Instant, id: &str, epoch: u64) -> (bool, String) {
        let entry = self.entries.get(id);
        if let Some(dispute) = entry.and_then(|entry| entry.dispute.as_ref()) {
            return (false, dispute.clone());
        }
        let leases = entry.into_iter().flat_map(|e| [&e.member, &e.candidate]);
        let lease = leases.flatten().find(|l| l.instance.epoch == epoch);
        match lease {
            Some(lease) => (
                lease.answered.is_some_and(|at| at + ANSWER_VALID > now),
                lease.trouble.clone(),
            ),
            None => (
                false,
                "registration removed: another id or epoch answers at the admin address".to_owned(),
            ),
        }
    }

    /// Returns true if this id and epoch are registered.
    pub(crate) fn holds(&self, id: &str, epoch: u64) -> bool {
        self.entries.get(id).is_some_and(|entry| {
            holds_epoch(&entry.member, epoch) || holds_epoch(&entry.candidate, epoch)
        })
    }

    /// Notes the models that an engine has listed. Returns true if they differ from the models that were known.
    pub(crate) fn learned(&mut self, id: &str, epoch: u64, models: Models) -> bool {
        let Some(entry) = self.entries.get_mut(id) else {
            return false;
        };
        let leases = [&mut entry.member, &mut entry.candidate];
        let is_it = |lease: &&mut Lease| lease.instance.epoch == epoch;
        let Some(lease) = leases.into_iter().flatten().find(is_it) else {
            return false;
        };
        let is_new = lease.instance.models != models;
        lease.instance.models = models;
        is_new
    }

    /// Returns the next time at which [`Registry::expire`] or [`Registry::due`] has something to do.
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
                // A call-back beyond the limit adds no deadline, because such a call-back begins when
                // another call-back ends.
                let may_call = !lease.calling && self.budget.has_place(lease);
                let call = may_call.then_some(lease.call_at);
                [lease.expires, stale, call].into_iter().flatten()
            })
            .min()
    }

    /// Returns all instances, members before candidates of the same id.
    pub(crate) fn instances(&self) -> Vec<Instance> {
        self.entries
            .values()
            .flat_map(|entry| [&entry.member, &entry.candidate])
            .flatten()
            .map(|lease| lease.instance.clone())
            .collect()
    }

    /// Returns the texts of new disputes, each once, for the log.
    pub(crate) fn disputes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.disputes)
    }

    /// Removes ids without registrations, and ends disputes in which one of the two sidecars has gone.
    fn tidy(&mut self, now: Instant) {
        self.entries
            .retain(|_, entry| entry.member.is_some() || entry.candidate.is_some());
        for entry in self.entries.values_mut() {
            entry.settle(now);
        }
    }
}

impl Entry {
    /// Begins a dispute: marks both sidecars with this id as not ready, and returns the text for the log.
    fn open_dispute(&mut self) -> Option<String> {
        let (member, candidate) = (self.member.as_mut()?, self.candidate.as_mut()?);
        let place = |lease: &Lease| {
            let admin = lease.instance.admin.as_ref();
            admin.unwrap_or(&lease.instance.http).to_string()
        };
        let dispute = format!(
            "two sidecars have the id {:?}: {} and {}; the proxy uses neither until one of them stops or gets another --id",
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

    /// Ends a dispute after one of the two sidecars has gone. A call-back to the other sidecar is due at
    /// once. If that sidecar answers, it gets requests again.
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

/// Time until the next call-back if the last call-back got no answer, or the answer "not ready".
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Time for which an answer `ready` is valid. A sidecar uses the same time: it is not ready if its last
/// acknowledgement is older.
pub(crate) const ANSWER_VALID: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
