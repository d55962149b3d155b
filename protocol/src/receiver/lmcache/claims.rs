//! Turns the lent slots of a parked request into a lease, and frees slots that no request claims.

use super::{LAST_PAUSE, Lent, Loan};
use crate::receiver::grant::Exposed;
use crate::receiver::reclaim::Readers;
use crate::receiver::request::{Allocation, Chunk, Lease};
use crate::receiver::{Action, Owner, Quarantine, Receiver, SenderId};
use crate::record::Record;
use crate::{LeaseId, Reason, RequestId, SlotIndex, Time};
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Duration;

use super::NO_REQUEST;

/// Slots of one parked request, before the check of their canaries.
#[derive(Debug)]
pub(super) struct Claim {
    /// Index of the chunk in the request, number of the loan, slot.
    picks: Vec<(usize, u64, SlotIndex)>,
}

impl Receiver {
    /// Looks up the lent slots of a parked request by key, after the sender has reported the end of
    /// its writes.
    ///
    /// A loan that names the request comes first, then loans without a request, oldest first. If
    /// several synchronous senders have the same prompt, the canaries show which sender has
    /// written.
    pub(in crate::receiver) fn claim(&mut self, id: &RequestId) {
        let Some(parked) = self.requests.get(id).and_then(|r| r.parked.as_ref()) else {
            return;
        };
        let picks = self.lmcache.pick(id, &parked.keys);
        let has = |index: u32| {
            picks
                .binary_search_by_key(&(index as usize), |p| p.0)
                .is_ok()
        };
        let plan = self.chunking.plan(parked.tokens, parked.have_tokens);
        let missing = (0..plan.chunks()).any(|index| !plan.is_empty(index) && !has(index));
        if missing {
            self.lmcache.release(&picks, self.now, Reason::NoSender);
            self.end_parked(id, Reason::NoSender, true);
            return;
        }
        if let Some((_, sender)) = self.lmcache.source(&picks) {
            self.readers.read(&sender);
        }
        let slots = picks.iter().map(|pick| pick.2).collect();
        self.lmcache.claims.insert(id.clone(), Claim { picks });
        self.actions.push_back(Action::CheckCanary { slots });
    }

    /// Handles the result of a check. The list `gone` has the slots whose canaries are all
    /// overwritten; the list `there` has the slots with at least one canary left.
    pub(in crate::receiver) fn on_canary_checked(
        &mut self,
        gone: &[SlotIndex],
        there: &[SlotIndex],
    ) {
        let now = self.now;
        let gone: &HashSet<SlotIndex> = &gone.iter().copied().collect();
        let there: &HashSet<SlotIndex> = &there.iter().copied().collect();
        for lent in self.lmcache.loans.values_mut().flat_map(|l| &mut l.chunks) {
            if gone.contains(&lent.slot) {
                lent.landed.get_or_insert(now);
            }
        }
        let decided: Vec<RequestId> = self
            .lmcache
            .claims
            .iter()
            .filter(|(_, claim)| {
                let seen = |slot| gone.contains(slot) || there.contains(slot);
                claim.picks.iter().all(|(_, _, slot)| seen(slot))
            })
            .map(|(id, _)| id.clone())
            .collect();
        for id in decided {
            let Some(claim) = self.lmcache.claims.remove(&id) else {
                continue;
            };
            if claim.picks.iter().all(|(_, _, slot)| gone.contains(slot)) {
                self.take_over(&id, &claim.picks);
            } else {
                self.lmcache
                    .release(&claim.picks, now, Reason::TransferFailed);
                self.end_parked(&id, Reason::TransferFailed, true);
            }
        }
        self.settle_quarantine(gone, there);
        self.end_loans();
    }

    /// Turns written slots into a lease, as if one of our sidecars had written into them.
    fn take_over(&mut self, id: &RequestId, picks: &[(usize, u64, SlotIndex)]) {
        let now = self.now;
        let parked = self.requests.get(id).and_then(|r| r.parked.as_ref());
        let (Some(parked), Some((route, sender))) = (parked, self.lmcache.source(picks)) else {
            self.lmcache.release(picks, now, Reason::Unclaimed);
            return;
        };
        let (keys, tokens) = (parked.keys.clone(), parked.tokens);
        let mut chunks = vec![Chunk::Skipped; keys.len()];
        self.lmcache.give_up(picks);
        for &(index, _, slot) in picks {
            chunks[index] = Chunk::Written { slot };
        }
        let written: Vec<usize> = picks.iter().map(|pick| pick.0).collect();
        let lease = Lease {
            id: LeaseId(self.rng.random()),
            route,
            sender: sender.clone(),
            owner: sender.owner(),
            transport: "nixl".to_owned(),
            seq: 0,
            keys,
            tokens,
            first_token: 0,
            chunks,
            term: Duration::ZERO,
            deadline: now,
            idle: None,
            end_reason: None,
        };
        if let Some(request) = self.requests.get_mut(id) {
            let record = &mut request.record;
            record.peer = sender.id;
            "nixl".clone_into(&mut record.transport);
            let plan = lease.plan(&self.chunking);
            for &index in &written {
                record.chunks += 1;
                record.bytes += plan.size(u32::try_from(index).unwrap_or(u32::MAX));
            }
            self.leases.insert(lease.id, id.clone());
            request.allocation = Allocation::Leased(lease);
        }
        self.landed(id, &written);
    }

    /// Acts on the deadlines of loans and waiting alloc requests.
    pub(in crate::receiver) fn on_lmcache_deadlines(&mut self) {
        let now = self.now;
        let mut slots = Vec::new();
        for loan in self.lmcache.loans.values_mut() {
            if loan.look <= now || loan.deadline <= now {
                loan.pause = (loan.pause * 2).min(LAST_PAUSE);
                loan.look = now + loan.pause;
                let open = loan.chunks.iter().filter(|c| c.landed.is_none());
                slots.extend(open.map(|c| c.slot));
            }
        }
        if self.lmcache.next_look.is_some_and(|look| look <= now) {
            let marked = self.quarantine.values().filter(|q| q.sender.is_lmcache());
            slots.extend(marked.flat_map(|q| q.slots.iter().copied()));
            self.lmcache.next_look = None;
        }
        if slots.is_empty() {
            self.end_loans();
        } else {
            self.actions.push_back(Action::CheckCanary { slots });
        }
        if !self.lmcache.asks.iter().any(|ask| ask.until <= now) {
            return;
        }
        // The receiver tries again to serve these alloc requests, because this event may have freed
        // slots.
        self.lend(false, &mut Exposed::default());
        let asks = std::mem::take(&mut self.lmcache.asks);
        let (late, waiting): (VecDeque<_>, _) = asks.into_iter().partition(|a| a.until <= now);
        self.lmcache.asks = waiting;
        for ask in late {
            self.decline(ask.route, &ask.sender, &ask.request, Reason::NoRoom);
        }
    }

    /// Ends loans whose deadline has passed, after a check of their canaries: frees the written
    /// slots and quarantines the other slots.
    fn end_loans(&mut self) {
        let now = self.now;
        // A loan with a claimed slot does not end yet: the check of that slot decides whether its
        // KV is complete.
        let over = |l: &Loan| l.deadline <= now && !l.chunks.iter().any(|c| c.claimed);
        let over: Vec<u64> = self
            .lmcache
            .loans
            .iter()
            .filter(|(_, l)| over(l))
            .map(|(n, _)| *n)
            .collect();
        for number in over {
            let Some(loan) = self.lmcache.loans.get_mut(&number) else {
                continue;
            };
            // If the last canary was overwritten only recently, the write may still be in flight.
            if let Some(fresh) = loan.fresh(now) {
                loan.deadline = fresh;
                continue;
            }
            let Some(loan) = self.lmcache.loans.remove(&number) else {
                continue;
            };
            // A slot with canaries was not written completely. The slot's sender may still write,
            // so no other request may get the slot.
            let mut lost = Vec::new();
            for lent in &loan.chunks {
                match lent.landed {
                    Some(_) => self.free(lent.slot),
                    None => lost.push(lent.slot),
                }
            }
            for &slot in &loan.reserved {
                self.free(slot);
            }
            let reason = match loan.reason {
                Some(reason) => reason,
                // The KV was written but not read. After several such loans in a row, the receiver
                // may free the sender's KV early.
                None if lost.is_empty() => {
                    self.readers.unread(&loan.sender);
                    Reason::Unclaimed
                }
                None => Reason::LeaseExpired,
            };
            self.record_loan(&loan, reason);
            if lost.is_empty() {
                continue;
            }
            // LMCache's senders report nothing to the receiver. So the slots become free only after
            // a check of the canaries, or after the proof that the sender's process has ended.
            self.lmcache.next_look.get_or_insert(now + LAST_PAUSE);
            self.quarantine.insert(
                loan.lease,
                Quarantine {
                    sender: loan.sender.clone(),
                    owner: loan.sender.owner(),
                    slots: lost,
                },
            );
            self.actions.push_back(Action::Fence {
                sender: loan.sender,
                lease: loan.lease,
                transport: "nixl".to_owned(),
            });
        }
    }

    /// Reports the record of a loan whose KV no decode request has read.
    fn record_loan(&mut self, loan: &Loan, reason: Reason) {
        if loan.chunks.is_empty() {
            return; // all of its slots were claimed
        }
        let req = loan
            .req
            .clone()
            .unwrap_or_else(|| RequestId::from(NO_REQUEST));
        let landed = loan.chunks.iter().filter(|c| c.landed.is_some()).count();
        self.actions.push_back(Action::Record(Record {
            peer: loan.sender.id.clone(),
            reason: Some(reason),
            chunks: u32::try_from(landed).unwrap_or(u32::MAX),
            ..Record::new(req)
        }));
    }

    /// Frees quarantined slots in which two checks, one second apart, found no canary: the slot's
    /// only write has ended.
    fn settle_quarantine(&mut self, gone: &HashSet<SlotIndex>, there: &HashSet<SlotIndex>) {
        let marked: Vec<LeaseId> = self
            .quarantine
            .iter()
            .filter(|(_, q)| q.sender.is_lmcache())
            .map(|(id, _)| *id)
            .collect();
        let before = std::mem::take(&mut self.lmcache.gone);
        let mut looked = false;
        let mut now_gone = BTreeSet::new();
        for id in &marked {
            let slots = self
                .quarantine
                .get(id)
                .map(|q| q.slots.clone())
                .unwrap_or_default();
            looked |= slots.iter().any(|s| gone.contains(s) || there.contains(s));
            now_gone.extend(slots.into_iter().filter(|s| gone.contains(s)));
        }
        if !looked {
            self.lmcache.gone = before;
            return;
        }
        for id in marked {
            self.unquarantine(id, |slot| {
                before.contains(&slot) && now_gone.contains(&slot)
            });
        }
        self.lmcache.gone = now_gone;
        if self.quarantine.values().any(|q| q.sender.is_lmcache()) {
            self.lmcache.next_look.get_or_insert(self.now + LAST_PAUSE);
        }
    }
}

impl Receiver {
    /// Ends a loan whose slots are all written, but whose KV no decode request has asked for.
    pub(in crate::receiver) fn end_idle_loan(&mut self, number: u64) {
        if let Some(loan) = self.lmcache.loans.remove(&number) {
            for slot in loan
                .chunks
                .iter()
                .map(|c| c.slot)
                .chain(loan.reserved.iter().copied())
            {
                self.free(slot);
            }
            self.record_loan(&loan, loan.reason.unwrap_or(Reason::Unclaimed));
        }
    }
}

impl super::Lmcache {
    /// Returns the loans whose slots are all written and whose KV no decode request has asked for.
    /// Each item has the time from which the loan may be freed, the loan's number and its sender's
    /// party.
    pub(in crate::receiver) fn idle<'a>(
        &'a self,
        readers: &'a Readers,
    ) -> impl Iterator<Item = (Time, u64, Owner)> + 'a {
        self.loans.iter().filter_map(|(&number, loan)| {
            let rests = |c: &Lent| c.landed.filter(|_| !c.claimed).map(|at| at + LAST_PAUSE);
            let at = loan.chunks.iter().map(rests).collect::<Option<Vec<_>>>()?;
            let at = at.into_iter().max()?;
            let complete = loan.reserved.is_empty() && !readers.has(&loan.sender);
            complete.then(|| (at, number, loan.sender.owner()))
        })
    }

    /// Claims one unclaimed slot for each key that has an unclaimed slot. Returns the claimed slots
    /// in the order of the keys.
    fn pick(&mut self, id: &RequestId, keys: &[String]) -> Vec<(usize, u64, SlotIndex)> {
        let wanted: HashSet<&str> = keys.iter().map(String::as_str).collect();
        let mut found: HashMap<&str, Vec<_>> = HashMap::new();
        for (&number, loan) in &self.loans {
            let named = loan.req.as_ref() == Some(id);
            if !named && loan.req.is_some() {
                continue;
            }
            for c in loan.chunks.iter().filter(|c| !c.claimed) {
                if let Some(&key) = wanted.get(c.key.as_str()) {
                    // The order of preference: slots of a loan that names the request, then slots
                    // that are known to be written, then slots of older loans.
                    let rank = (!named, c.landed.is_none(), number);
                    found.entry(key).or_default().push((rank, c.slot));
                }
            }
        }
        for slots in found.values_mut() {
            slots.sort_unstable_by(|a, b| b.cmp(a));
        }
        let picks: Vec<_> = keys
            .iter()
            .enumerate()
            .filter_map(|(index, key)| {
                let ((.., number), slot) = found.get_mut(key.as_str())?.pop()?;
                Some((index, number, slot))
            })
            .collect();
        self.each(&picks, |lent| lent.claimed = true);
        picks
    }

    /// Applies a change to each picked slot.
    fn each(&mut self, picks: &[(usize, u64, SlotIndex)], change: impl Fn(&mut Lent)) {
        for (number, slots) in by_loan(picks) {
            if let Some(loan) = self.loans.get_mut(&number) {
                let picked = loan.chunks.iter_mut().filter(|c| slots.contains(&c.slot));
                picked.for_each(&change);
            }
        }
    }

    /// Releases claimed slots that their request does not use, and ends their loans.
    fn release(&mut self, picks: &[(usize, u64, SlotIndex)], now: Time, reason: Reason) {
        self.each(picks, |lent| lent.claimed = false);
        for number in by_loan(picks).into_keys() {
            if let Some(loan) = self.loans.get_mut(&number) {
                loan.end(now, reason);
            }
        }
    }

    /// Removes slots from their loans.
    fn give_up(&mut self, picks: &[(usize, u64, SlotIndex)]) {
        for (number, slots) in by_loan(picks) {
            if let Some(loan) = self.loans.get_mut(&number) {
                loan.chunks.retain(|c| !slots.contains(&c.slot));
                if loan.chunks.is_empty() && loan.reserved.is_empty() {
                    self.loans.remove(&number);
                }
            }
        }
    }

    fn source(&self, picks: &[(usize, u64, SlotIndex)]) -> Option<(super::Route, SenderId)> {
        let loan = self.loans.get(&picks.first()?.1)?;
        Some((loan.route, loan.sender.clone()))
    }
}

impl Loan {
    /// Returns the time from which the loan's most recently written slot may become free; `None` if
    /// all slots of the loan may become free now.
    fn fresh(&self, now: Time) -> Option<Time> {
        let landed = self.chunks.iter().filter_map(|c| c.landed);
        landed
            .map(|at| at + LAST_PAUSE)
            .filter(|rest| *rest > now)
            .max()
    }
}

/// Returns the picked slots of each loan.
fn by_loan(picks: &[(usize, u64, SlotIndex)]) -> BTreeMap<u64, HashSet<SlotIndex>> {
    let mut all: BTreeMap<u64, HashSet<SlotIndex>> = BTreeMap::new();
    for &(_, number, slot) in picks {
        all.entry(number).or_default().insert(slot);
    }
    all
}
