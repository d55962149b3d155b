//! Serves LMCache's senders. These senders do not know leases, so the receiver lends slots to them.
//!
//! An LMCache sender asks for slots by key, writes, and reports the end only to its *proxy*
//! (`ProxyNotif`). The sender sends no report to the receiver, not even through NIXL. The
//! synchronous sender reports success to the proxy even if an earlier batch failed. So the receiver
//! shows a slot to the engine only if both conditions hold:
//!
//! * the proxy has got the sender's report for this request, and the decode request confirms this (`Await.written`).
//!   Every write of the request has then ended, successfully or not;
//! * all *canaries* in the slot are overwritten. Canaries are random bytes that the receiver put
//!   all over the slot before it lent the slot. A write covers a whole slot. So the write is
//!   complete if and only if no canary is left.
//!
//! ```text
//!  AllocRequest ──room──▶ Lent ──no canary left──▶ Landed ──Await{written}──▶ a lease, as any other
//!       │                  │ max_lease over            │ max_lease over
//!       ▼ wait over        ▼                           ▼
//!    declined          quarantined ──no canary───▶    free
//! ```
//!
//! A sender writes at most once into each lent slot. So if all canaries have been overwritten for a while, no
//! write can still arrive, even if the sender has died. A key does not show which process writes into which
//! slot. So the receiver never uses `already_sent` for keys that it has. The receiver uses `already_sent`
//! only to decline a request, and the answer then contains *all* keys of the request. So the sender writes
//! nothing and reports to its proxy at once, and the decode side computes the prompt. LMCache's own refusal
//! is −1. After this refusal the sender would send no report, and LMCache's proxy would wait for the report
//! for ever. So the receiver uses −1 only for requests that no buffer could ever serve.

mod claims;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use rand::Rng;

use super::ended::Heard;
use super::grant::Exposed;
use super::reclaim::Blocked;
use super::{Action, Owner, Quarantine, Receiver, Route, SenderId};
use crate::message::{AllocRequest, AllocResponse, CancelNotif, ToSender};
use crate::record::Record;
use crate::{Epoch, LeaseId, Reason, RequestId, SlotIndex, Time};
use claims::Claim;

/// State of all LMCache senders.
#[derive(Debug, Default)]
pub(super) struct Lmcache {
    /// Name of each connection's sender; true if the sender knows the addresses of the current
    /// slots.
    names: BTreeMap<Route, (SenderId, bool)>,
    /// Alloc requests that wait for slots, in the order in which they came.
    asks: VecDeque<Ask>,
    /// Loans by number, oldest first.
    loans: BTreeMap<u64, Loan>,
    next: u64,
    /// Parked requests that wait for the check of their slots' canaries.
    claims: BTreeMap<RequestId, Claim>,
    /// Quarantined slots whose canaries were gone at the last check.
    gone: BTreeSet<SlotIndex>,
    next_look: Option<Time>,
}

/// Alloc request that waits for slots.
#[derive(Debug)]
pub(super) struct Ask {
    route: Route,
    sender: SenderId,
    request: AllocRequest,
    until: Time,
}

/// Slots that are lent for one alloc request of a synchronous sender, or for all alloc requests of
/// one request of an asynchronous sender.
#[derive(Debug)]
struct Loan {
    lease: LeaseId,
    route: Route,
    sender: SenderId,
    /// Request of the loan. Absent for synchronous senders, which send no request id.
    req: Option<RequestId>,
    chunks: Vec<Lent>,
    /// Slots reserved for later batches of the request.
    reserved: Vec<SlotIndex>,
    deadline: Time,
    look: Time,
    pause: Duration,
    /// Reason why the loan ends before its deadline. Absent: the loan lasts until its deadline.
    reason: Option<Reason>,
}

/// One lent slot.
#[derive(Debug)]
struct Lent {
    key: String,
    slot: SlotIndex,
    /// Time at which a check first found no canary in the slot. Absent: every check so far has
    /// found a canary.
    landed: Option<Time>,
    /// True if a parked request waits for the check of this slot.
    claimed: bool,
}

impl Receiver {
    /// Notes the name of a connection's sender. The quotas use the part of the name before the
    /// first `/`, which is the host.
    pub(super) fn on_introduced(&mut self, route: Route, sender: SenderId, linked: bool) {
        self.lmcache.names.insert(route, (sender, linked));
    }

    /// Handles an alloc request of an LMCache sender: holds it or declines it.
    pub(super) fn on_borrow(&mut self, route: Route, request: AllocRequest) {
        let (sender, linked) = self.lmcache.name(route);
        let chunks = u32::try_from(request.keys.len()).unwrap_or(u32::MAX);
        let all = chunks.max(request.total_chunks);
        let owner = sender.owner();
        let refusal = if request.keys.is_empty() {
            return self.answer(route, Vec::new(), 0);
        } else if !self.fits(&request) {
            Reason::LayoutMismatch
        } else if !linked {
            Reason::StaleEpoch
        } else if self.draining {
            Reason::Draining
        } else if all as usize > self.quota(&owner) {
            Reason::TooLarge
        } else if self.lent_and_lost_by(&owner) > self.config.max_quarantined as usize {
            Reason::Quarantined
        } else if self.lmcache.asks.len() >= self.config.max_requests {
            Reason::Busy
        } else {
            let until = self.now + self.config.lmcache_wait;
            self.lmcache.asks.push_back(Ask {
                route,
                sender,
                request,
                until,
            });
            return;
        };
        self.decline(route, &sender, &request, refusal);
    }

    /// Ends a request that an asynchronous sender cancels. Writes of the request may still be in flight, so the
    /// receiver checks the canaries of the request's slots before it frees these slots.
    pub(super) fn on_return(&mut self, route: Route, cancel: &CancelNotif) {
        let (now, (sender, _)) = (self.now, self.lmcache.name(route));
        let req = RequestId(cancel.req_id.clone());
        let given_up = |ask: &Ask| ask.sender == sender && ask.request.req_id == req.0;
        let asks = std::mem::take(&mut self.lmcache.asks);
        let (off, on): (VecDeque<_>, _) = asks.into_iter().partition(given_up);
        self.lmcache.asks = on;
        for ask in off {
            self.decline(ask.route, &ask.sender, &ask.request, Reason::Cancelled);
        }
        // The cancel applies only to the current loans. A later request can have the same id,
        // because LMCache's proxies count from 1 at each start.
        for loan in self.lmcache.loans.values_mut() {
            if loan.sender == sender && loan.req.as_ref() == Some(&req) {
                loan.end(now, Reason::Cancelled);
            }
        }
        self.answer(route, Vec::new(), 0);
    }

    /// Lends slots to waiting alloc requests, in the order of their arrival. A later batch of a
    /// request gets at once the slots that are reserved for it. Returns the resource that an alloc
    /// request still waits for; `None` if no alloc request waits.
    pub(super) fn lend(&mut self, blocked: bool, exposed: &mut Exposed) -> Option<Blocked> {
        if self.lmcache.asks.is_empty() {
            return None;
        }
        let mut lacks = None;
        let mut blocked = blocked;
        let mut named = self.lmcache.named();
        for ask in std::mem::take(&mut self.lmcache.asks) {
            let want = ask.request.keys.len();
            let name = ask.request.request().map(|req| (ask.sender.clone(), req));
            let loan = name.as_ref().and_then(|name| named.get(name)).copied();
            let reserved = loan
                .and_then(|n| self.lmcache.loans.get(&n))
                .map_or(0, |l| l.reserved.len());
            // A request gets all its slots at once: two requests with only some of their slots
            // could wait for each other for ever.
            let beyond = match loan {
                Some(_) => want.saturating_sub(reserved),
                None => want.max(ask.request.total_chunks as usize),
            };
            let owner = ask.sender.owner();
            // A request that exceeds its host's quota must not block the requests of other hosts.
            let waits = beyond > 0 && exposed.to(&owner, self) + beyond > self.quota(&owner);
            if beyond == 0 || !(waits || blocked || beyond > self.slots.free() as usize) {
                let number = self.grant_loan(&ask, loan);
                exposed.add(&owner, beyond);
                named.extend(name.map(|name| (name, number)));
            } else {
                lacks.get_or_insert(if waits {
                    Blocked::Share(owner)
                } else {
                    Blocked::Room
                });
                blocked |= !waits;
                self.lmcache.asks.push_back(ask);
            }
        }
        lacks
    }

    /// Lends the slots of one alloc request and returns the number of their loan.
    fn grant_loan(&mut self, ask: &Ask, loan: Option<u64>) -> u64 {
        let (now, term) = (self.now, self.config.max_lease);
        // Later batches of a request are added to its loan, so that all of them end together.
        let number = loan.unwrap_or_else(|| {
            let number = self.lmcache.next;
            self.lmcache.next += 1;
            let loan = Loan {
                lease: LeaseId(self.rng.random()),
                route: ask.route,
                sender: ask.sender.clone(),
                req: ask.request.request(),
                chunks: Vec::new(),
                reserved: Vec::new(),
                deadline: now + term,
                look: now + FIRST_LOOK,
                pause: FIRST_LOOK,
                reason: None,
            };
            self.lmcache.loans.insert(number, loan);
            number
        });
        if let Some(req) = ask.request.request() {
            // LMCache's proxies count from 1 at each start, so from now on the id means the new
            // request.
            self.ended.renew(&req);
        }
        let Some(loan) = self.lmcache.loans.get_mut(&number) else {
            return number;
        };
        // Each batch shows that the sender is alive, so the loan gets a new deadline.
        loan.deadline = now + term;
        (loan.look, loan.pause) = (now + FIRST_LOOK, FIRST_LOOK);
        let mut slots = Vec::with_capacity(ask.request.keys.len());
        for key in &ask.request.keys {
            let Some(slot) = loan.reserved.pop().or_else(|| self.slots.take()) else {
                break; // `lend` has checked that enough slots are free
            };
            // The receiver must put the canaries into the slot before it answers the sender: later
            // canaries could overwrite KV.
            self.actions.push_back(Action::Mark { slot });
            loan.chunks.push(Lent {
                key: key.clone(),
                slot,
                landed: None,
                claimed: false,
            });
            slots.push(slot);
        }
        // After the last batch no further batch comes, so the reserved slots become free for other
        // requests.
        let all = ask.request.total_chunks as usize;
        if ask.request.is_last_batch || ask.request.request().is_none() {
            for slot in std::mem::take(&mut loan.reserved) {
                self.slots.give(slot);
            }
        } else {
            while loan.chunks.len() + loan.reserved.len() < all {
                let Some(slot) = self.slots.take() else {
                    break;
                };
                loan.reserved.push(slot);
            }
        }
        let indexes = slots.iter().map(|slot| i64::from(slot.0)).collect();
        self.answer(ask.route, indexes, 0);
        number
    }

    fn answer(&mut self, route: Route, remote_indexes: Vec<i64>, already: u32) {
        let response = AllocResponse {
            remote_indexes,
            already_sent_indexes: (0..already).collect(),
            x: None,
        };
        self.send(route, ToSender::AllocResponse(response));
    }

    /// Declines an alloc request. The module's documentation explains the two kinds of refusal.
    fn decline(&mut self, route: Route, sender: &SenderId, asked: &AllocRequest, reason: Reason) {
        let keys = asked.keys.len();
        if reason == Reason::LayoutMismatch {
            self.answer(route, vec![-1; keys], 0);
        } else {
            self.answer(route, Vec::new(), u32::try_from(keys).unwrap_or(u32::MAX));
        }
        if let Some(req) = asked.request() {
            for loan in self.lmcache.loans.values_mut() {
                if loan.sender == *sender && loan.req.as_ref() == Some(&req) {
                    loan.end(self.now, reason);
                }
            }
            // A decode request may still come. The receiver will answer that decode request with this reason.
            let heard = Heard {
                question: None,
                awaited: false,
            };
            self.ended.insert(&req, Some(reason), heard, self.now);
        }
        let chunks = u32::try_from(keys).unwrap_or(u32::MAX);
        // The peer chose both numbers. Both numbers can be invalid: an invalid number can even be
        // the reason for the refusal.
        let full = chunks.saturating_sub(1);
        let tokens = full.saturating_mul(self.config.chunk_tokens);
        let tokens = tokens.saturating_add(asked.last_chunk_toks);
        let req = asked
            .request()
            .unwrap_or_else(|| RequestId::from(NO_REQUEST));
        self.actions.push_back(Action::Record(Record {
            peer: sender.id.clone(),
            reason: Some(reason),
            tokens,
            ..Record::new(req)
        }));
    }

    /// Returns true if the chunks of the alloc request have the receiver's layout.
    fn fits(&self, asked: &AllocRequest) -> bool {
        let full = self.config.chunk_tokens;
        let Some(layout) = &self.config.layout else {
            return false;
        };
        let first = if asked.keys.len() == 1 {
            asked.last_chunk_toks
        } else {
            full
        };
        // LMCache knows no groups of layers.
        layout.groups.is_empty()
            && (1..=full).contains(&asked.last_chunk_toks)
            && asked.fmt == layout.format()
            && asked.dtype == layout.dtype
            && asked.shape == layout.shape(first)
    }

    /// Returns the number of quarantined slots of one host's LMCache senders.
    fn lent_and_lost_by(&self, owner: &Owner) -> usize {
        let of_host = |q: &&Quarantine| q.sender.is_lmcache() && q.owner == *owner;
        let all = self.quarantine.values().filter(of_host);
        all.map(|q| q.slots.len()).sum()
    }
}

impl Lmcache {
    fn name(&self, route: Route) -> (SenderId, bool) {
        let unknown = || SenderId {
            id: format!("lmcache/{}", route.0),
            epoch: Epoch(0),
        };
        self.names
            .get(&route)
            .cloned()
            .unwrap_or_else(|| (unknown(), false))
    }

    /// Returns the alloc requests that wait for slots.
    pub(super) fn asks(&self) -> &VecDeque<Ask> {
        &self.asks
    }

    /// Returns, for each sender and request, the number of the loan to which later batches of the request belong.
    fn named(&self) -> BTreeMap<(SenderId, RequestId), u64> {
        let going = self.loans.iter().filter(|(_, l)| l.reason.is_none());
        // If two loans have the same sender and request, the later loan counts.
        going
            .filter_map(|(number, l)| Some(((l.sender.clone(), l.req.clone()?), *number)))
            .collect()
    }

    /// Forgets a lost connection and its waiting alloc requests. The slots of its loans stay lent,
    /// because writes may still arrive.
    pub(super) fn lost(&mut self, route: Route) {
        self.names.remove(&route);
        self.asks.retain(|ask| ask.route != route);
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        let asks = self.asks.iter().map(|ask| ask.until);
        let loans = self.loans.values().map(|l| {
            let open = l.chunks.iter().any(|c| c.landed.is_none());
            if open {
                l.deadline.min(l.look)
            } else {
                l.deadline
            }
        });
        asks.chain(loans).chain(self.next_look).min()
    }

    /// Returns the number of slots that are lent or reserved.
    pub(super) fn held(&self) -> usize {
        let of = |l: &Loan| l.chunks.len() + l.reserved.len();
        self.loans.values().map(of).sum()
    }

    /// Returns the number of slots that are lent to or reserved for one host's senders.
    pub(super) fn held_by(&self, owner: &Owner) -> usize {
        let loans = self.loans.values().filter(|l| l.sender.owner() == *owner);
        loans.map(|l| l.chunks.len() + l.reserved.len()).sum()
    }

    /// Returns the number of slots into which a write may be in flight. If there are any, the
    /// transport must make progress.
    pub(super) fn writing(&self) -> usize {
        let all = self.loans.values().flat_map(|l| &l.chunks);
        all.filter(|c| c.landed.is_none()).count()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.asks.is_empty() && self.loans.is_empty()
    }
}

impl Loan {
    /// Ends a loan after one more check of the loan's slots.
    fn end(&mut self, now: Time, reason: Reason) {
        self.reason.get_or_insert(reason);
        self.deadline = self.deadline.min(now);
    }
}

impl SenderId {
    /// Returns true for LMCache's senders. These senders have epoch 0, which our sidecars never
    /// have.
    pub(super) fn is_lmcache(&self) -> bool {
        self.epoch == Epoch(0)
    }

    /// Returns the party of an LMCache sender: its host, because LMCache has no keys.
    pub(super) fn owner(&self) -> Owner {
        Owner::host(self.id.split('/').next().unwrap_or_default())
    }
}

/// Time from the start of a loan to the first check of its slots. The pause doubles after each
/// check, up to [`LAST_PAUSE`].
const FIRST_LOOK: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Request id in the records of synchronous senders, which send no id.
const NO_REQUEST: &str = "-";
