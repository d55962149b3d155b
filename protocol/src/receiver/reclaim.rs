//! Frees written KV that no decode request asks for.
//!
//! A decode request may come late, so the receiver keeps written KV. But some proxies send decode
//! requests that do not ask for KV (LMCache's proxy in front of our decode side). With such a proxy
//! the KV of a few requests fills the buffer, and all other requests wait until this KV expires. So
//! when a request waits for slots, the receiver looks for senders whose KV no decode request has
//! read recently, and frees their oldest KV first. The receiver keeps the KV of all other senders,
//! because decode requests for this KV may still wait in the engine's queue.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Owner, Receiver, SenderId};
use crate::receiver::request::{Allocation, Request};
use crate::{Reason, RequestId, Time};

/// The senders whose KV a decode request has recently read. The map counts for each sender how
/// often its KV has expired unread; a read sets this number back to 0.
#[derive(Debug, Default)]
pub(super) struct Readers {
    unread: BTreeMap<String, u32>,
}

impl Readers {
    /// Notes that a decode request has asked for KV of this sender.
    pub(super) fn read(&mut self, sender: &SenderId) {
        if self.unread.len() >= MAX_READERS && !self.unread.contains_key(&sender.id) {
            self.unread.pop_first();
        }
        self.unread.insert(sender.id.clone(), 0);
    }

    /// Notes that KV of this sender has expired unread.
    pub(super) fn unread(&mut self, sender: &SenderId) {
        if let Some(count) = self.unread.get_mut(&sender.id) {
            *count += 1;
            if *count >= UNREAD {
                self.unread.remove(&sender.id);
            }
        }
    }

    pub(super) fn has(&self, sender: &SenderId) -> bool {
        self.unread.contains_key(&sender.id)
    }
}

/// Resource that a request waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Blocked {
    /// Free slots.
    Room,
    /// Slots within the quota of this party.
    Share(Owner),
}

impl Receiver {
    /// Frees the oldest KV that probably no decode request will read. Returns true if it freed any
    /// KV.
    pub(super) fn reclaim(&mut self, blocked: &Blocked) -> bool {
        let now = self.now;
        let lease = match blocked {
            Blocked::Room => self.idle_leases().min().filter(|(at, _)| *at <= now),
            // The quota of a party counts only slots that are lent or open for writes. Written slots
            // of a lease do not count, so the receiver frees none of them for a quota.
            Blocked::Share(_) => None,
        };
        let loans = self.lmcache.idle(&self.readers);
        let loan = loans
            .filter(|(_, _, owner)| {
                *blocked == Blocked::Room || *blocked == Blocked::Share(owner.clone())
            })
            .map(|(at, number, _)| (at, number))
            .min()
            .filter(|(at, _)| *at <= now);
        match (lease, loan) {
            (Some((at, _)), Some((other, number))) if other < at => self.end_idle_loan(number),
            (Some((_, id)), _) => self.end_unclaimed(&id),
            (None, Some((_, number))) => self.end_idle_loan(number),
            (None, None) => return false,
        }
        true
    }

    /// Returns the time from which further KV may be freed for the waiting requests; `None` if no
    /// request waits or no KV can be freed.
    pub(super) fn reclaim_at(&self) -> Option<Time> {
        if self.waiting.is_empty() && self.lmcache.asks().is_empty() {
            return None;
        }
        let leases = self.idle_leases().map(|(at, _)| at);
        let loans = self.lmcache.idle(&self.readers).map(|(at, ..)| at);
        // The buffer may still have KV that could be freed already. The receiver keeps this KV,
        // because freeing it does not help the waiting requests.
        leases.chain(loans).filter(|at| *at > self.now).min()
    }

    /// Returns the leases without a decode request, and the time from which each may be freed.
    fn idle_leases(&self) -> impl Iterator<Item = (Time, RequestId)> + '_ {
        self.requests.iter().filter_map(|(id, request)| {
            let lease = request.lease().filter(|l| l.end_reason.is_none())?;
            let since = lease.idle.filter(|_| request.parked.is_none())?;
            let spared = self.readers.has(&lease.sender);
            (!spared).then(|| (since + GRACE, id.clone()))
        })
    }

    /// Ends a lease whose chunks are all written, but whose KV no decode request has asked for.
    pub(super) fn end_unclaimed(&mut self, id: &RequestId) {
        if let Some(request) = self.requests.get_mut(id) {
            request.record.reason.get_or_insert(Reason::Unclaimed);
        }
        self.settle_over(id, Reason::Unclaimed);
    }

    /// Makes the id free for a new request if `gives_way` permits it. The old request then ends
    /// under a new name. The name contains a control character, so that no proxy can use it as an
    /// id.
    pub(super) fn make_way(&mut self, id: &RequestId, gives_way: impl Fn(&Request) -> bool) {
        let old = self.requests.get(id);
        let gives_way = old.is_some_and(|old| {
            old.parked.is_none()
                && old.lent.is_empty()
                && matches!(old.allocation, Allocation::Leased(_))
                && gives_way(old)
        });
        if !gives_way {
            return;
        }
        if let Some(lease) = self.requests.get(id).and_then(Request::lease)
            && lease.end_reason.is_none()
        {
            self.end_unclaimed(id);
        }
        let rest = self.requests.remove(id);
        if let Some(request) = &rest {
            let heard = request.heard.clone();
            self.ended
                .insert(id, request.record.reason, heard, self.now);
        }
        self.ended.renew(id);
        let Some(request) = rest else {
            return;
        };
        self.set_aside += 1;
        let aside = RequestId(format!("{id}\u{1}{}", self.set_aside));
        if let Some(lease) = request.lease() {
            self.leases.insert(lease.id, aside.clone());
        }
        self.requests.insert(aside, request);
    }
}

/// Minimum time for which unread KV is kept. This time is long enough for a decode request that the
/// proxy sends at once.
const GRACE: Duration = Duration::from_millis(500);
/// If this many leases or loans of a sender expire unread in a row, the receiver no longer keeps
/// the sender's KV.
const UNREAD: u32 = 4;
/// Maximum number of senders that the receiver remembers.
const MAX_READERS: usize = 1024;
