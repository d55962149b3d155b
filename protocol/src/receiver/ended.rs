//! Recently ended requests. If one side of an ended request sends its first message late, the
//! receiver tells this side at once that the request has ended.
//!
//! Proxies reuse ids; LMCache's proxy counts from 1 at each start. So only two kinds of messages
//! belong to the ended request and get the reason of its end: a repetition of its alloc request,
//! and the first message of a side that had sent no message before the end. A late first message
//! must come within [`LATE`] after the end. Any other message with the id belongs to a new request.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::SenderId;
use crate::message::AllocX;
use crate::{Reason, RequestId, Time};

/// Identity of an alloc request: the sender, and the number that the sender gave to the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) sender: SenderId,
    pub(super) seq: u64,
}

/// The messages that the receiver has got from both sides of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Heard {
    /// Last alloc request; absent if there was none.
    pub(super) question: Option<Question>,
    /// True if the decode request has come.
    pub(super) awaited: bool,
}

/// The most recently ended requests, by id.
#[derive(Debug, Default)]
pub(super) struct Ended {
    ends: BTreeMap<RequestId, End>,
    order: VecDeque<RequestId>,
}

#[derive(Debug)]
struct End {
    reason: Option<Reason>,
    at: Time,
    question: Option<Question>,
    /// True if the next alloc request with the id belongs to the ended request.
    asks_late: bool,
    /// True if the next decode request with the id belongs to the ended request.
    awaits_late: bool,
}

impl End {
    fn is_fresh(&self, now: Time) -> bool {
        self.at + LATE > now
    }

    fn reason(&self) -> Reason {
        self.reason.unwrap_or(Reason::Duplicate)
    }
}

impl Ended {
    /// Remembers the end of a request.
    pub(super) fn insert(
        &mut self,
        id: &RequestId,
        reason: Option<Reason>,
        heard: Heard,
        now: Time,
    ) {
        let before = self.ends.remove(id);
        if before.is_none() {
            self.order.push_back(id.clone());
        }
        let end = End {
            reason,
            at: now,
            asks_late: heard.question.is_none(),
            awaits_late: !heard.awaited,
            question: heard.question.or(before.and_then(|end| end.question)),
        };
        self.ends.insert(id.clone(), end);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.ends.remove(&oldest);
        }
    }

    /// Looks up the ended request to which an alloc request belongs, and returns the reason that
    /// the receiver's answer must give. Returns `None` if the alloc request begins a new request.
    pub(super) fn asked(
        &mut self,
        id: &RequestId,
        question: &Question,
        now: Time,
    ) -> Option<Reason> {
        let end = self.ends.get_mut(id)?;
        let again = end
            .question
            .as_ref()
            .is_some_and(|q| q.sender == question.sender && question.seq <= q.seq);
        if again {
            return Some(end.reason());
        }
        let late = std::mem::replace(&mut end.asks_late, false) && end.is_fresh(now);
        if late {
            end.question = Some(question.clone());
            return Some(end.reason());
        }
        end.awaits_late = false;
        None
    }

    /// Looks up the ended request to which a decode request belongs. Returns the reason that the
    /// receiver's answer must give, and the ended request's last sender; `None` if the decode
    /// request begins a new request.
    pub(super) fn awaited(
        &mut self,
        id: &RequestId,
        now: Time,
    ) -> Option<(Reason, Option<SenderId>)> {
        let end = self.ends.get_mut(id)?;
        if std::mem::replace(&mut end.awaits_late, false) && end.is_fresh(now) {
            return Some((
                end.reason(),
                end.question.as_ref().map(|q| q.sender.clone()),
            ));
        }
        end.asks_late = false;
        None
    }

    /// Notes that the id now belongs to a new request. For requests of LMCache senders this call is
    /// necessary, because these requests have no number that distinguishes an old request from a
    /// new request.
    pub(super) fn renew(&mut self, id: &RequestId) {
        if let Some(end) = self.ends.get_mut(id) {
            (end.asks_late, end.awaits_late) = (false, false);
        }
    }
}

impl Question {
    pub(super) fn of(x: &AllocX) -> Self {
        Self {
            sender: SenderId {
                id: x.id.clone(),
                epoch: x.epoch,
            },
            seq: x.seq,
        }
    }
}

/// Number of ended requests that the receiver remembers. A busy instance ends this many requests in
/// a few seconds.
const REMEMBERED: usize = 4096;
/// For this time after the end of a request, the receiver answers the first message of a late side
/// with the reason of the end. If the message comes after this time, the side gets no such answer
/// and waits until its own timeout.
const LATE: Duration = Duration::from_secs(30);
