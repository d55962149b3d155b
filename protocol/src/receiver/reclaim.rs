//! KV that stands there and that nobody comes for.
//!
//! A decode request may come late, so what is written is kept for it. But some proxies send decode requests
//! that ask for nothing (LMCache's in front of our decode side); then the KV of a few requests fills the
//! buffer, and everybody else waits for it to run out. So where somebody waits for room, the oldest KV
//! goes of a sender of which nothing has been read lately. A sender of which something was read keeps all
//! of its KV: behind it stands a proxy that sends its decode requests, and they may queue.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Receiver, SenderId};
use crate::receiver::request::{Allocation, Request};
use crate::{Reason, RequestId, Time};

/// Senders of which something has been read, with how many leases have run out unread since.
#[derive(Debug, Default)]
pub(super) struct Readers {
    unread: BTreeMap<String, u32>,
}

impl Readers {
    /// A decode request has come for KV of this sender.
    pub(super) fn read(&mut self, sender: &SenderId) {
        if self.unread.len() >= MAX_READERS && !self.unread.contains_key(&sender.id) {
            self.unread.pop_first();
        }
        self.unread.insert(sender.id.clone(), 0);
    }

    /// KV of this sender has run out unread.
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

/// What somebody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Blocked {
    /// Slots.
    Room,
    /// A part of what this host may have.
    Share(String),
}

impl Receiver {
    /// Frees the oldest KV that nobody seems to read. Says whether there was any.
    pub(super) fn reclaim(&mut self, blocked: &Blocked) -> bool {
        let now = self.now;
        let lease = match blocked {
            Blocked::Room => self.idle_leases().min().filter(|(at, _)| *at <= now),
            // Of the share of a host only what is lent, or may be written, is counted.
            Blocked::Share(_) => None,
        };
        let loans = self.lmcache.idle(&self.readers);
        let loan = loans
            .filter(|(_, _, host)| {
                *blocked == Blocked::Room || *blocked == Blocked::Share((*host).to_owned())
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

    /// When the next KV may go for who waits now.
    pub(super) fn reclaim_at(&self) -> Option<Time> {
        if self.waiting.is_empty() && self.lmcache.asks().is_empty() {
            return None;
        }
        let leases = self.idle_leases().map(|(at, _)| at);
        let loans = self.lmcache.idle(&self.readers).map(|(at, ..)| at);
        // What may go already was not of use to them.
        leases.chain(loans).filter(|at| *at > self.now).min()
    }

    /// Leases that nobody has come for, with the time from which they may go.
    fn idle_leases(&self) -> impl Iterator<Item = (Time, RequestId)> + '_ {
        self.requests.iter().filter_map(|(id, request)| {
            let lease = request.lease().filter(|l| l.end_reason.is_none())?;
            let since = lease.idle.filter(|_| request.parked.is_none())?;
            let spared = self.readers.has(&lease.sender);
            (!spared).then(|| (since + GRACE, id.clone()))
        })
    }

    /// Ends a lease that is written and that nobody has come for.
    pub(super) fn end_unclaimed(&mut self, id: &RequestId) {
        if let Some(request) = self.requests.get_mut(id) {
            request.record.reason.get_or_insert(Reason::Unclaimed);
        }
        self.settle_over(id, Reason::Unclaimed);
    }

    /// A request under this id begins anew. What is left of an earlier one, if `gives_way`, ends under a name of its
    /// own: a control character keeps it apart from every id.
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

/// A decode request that is sent at once has come by then.
const GRACE: Duration = Duration::from_millis(500);
/// So many leases in a row that nobody reads, and the sender is none whose KV is read.
const UNREAD: u32 = 4;
/// Senders that are remembered.
const MAX_READERS: usize = 1024;
