//! Requests that ended lately, so that the side that comes late is told at once.
//!
//! Proxies give ids anew, LMCache's counts from 1 at each start. So an old end answers only what belongs to
//! it: a repetition of the question that it answered, and the first word of a side that had not been heard
//! before it, within [`LATE`]. Everything else under the id is a request like any other.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::SenderId;
use crate::message::AllocX;
use crate::{Reason, RequestId, Time};

/// Which question: a sender numbers them in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) sender: SenderId,
    pub(super) seq: u64,
}

/// Which sides of a request have been heard of.
#[derive(Clone, Debug, Default)]
pub(super) struct Heard {
    /// The last question.
    pub(super) question: Option<Question>,
    /// The decode side.
    pub(super) awaited: bool,
}

/// See the module's documentation.
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
    /// A question that comes now belongs to it.
    asks_late: bool,
    /// A decode request that comes now belongs to it.
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
    /// A request has ended.
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

    /// How the request ended that this question belongs to, if it is not a new one.
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

    /// How the request ended that this decode request belongs to, if it is not a new one; and the sender
    /// that had written for it.
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

    /// The id is in use again, by a sender that numbers nothing.
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

/// How many ended requests are remembered: a few seconds of a busy instance.
const REMEMBERED: usize = 4096;
/// How long after a request's end its other side may come. Later it waits within its own bound.
const LATE: Duration = Duration::from_secs(30);
