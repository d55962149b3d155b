//! The kept KV of one rank, by token.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::super::Sender;
use super::super::request::Term;
use crate::{EngineId, Reason, RequestId, Time, Token};

/// All kept KV of one rank.
#[derive(Debug, Default)]
pub(in crate::sender) struct Store {
    pub(super) kept: BTreeMap<Token, Kept>,
    /// Number of changes of `kept` so far.
    pub(super) changes: u64,
    /// Tokens of KV that is being pushed, with the engine's id of the request.
    pub(super) fetched: BTreeMap<Token, RequestId>,
    /// Recently ended tokens, oldest first, for decode requests that come late.
    pub(super) ended: VecDeque<(Token, Reason)>,
}

/// KV of one request in the engine's blocks.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) engine: EngineId,
    pub(super) req: RequestId,
    pub(super) keys: Vec<String>,
    pub(super) tokens: u32,
    pub(super) upto: u32,
    pub(super) term: Term,
    /// Decode requests that have renewed.
    pub(super) renewers: BTreeSet<RequestId>,
}

/// Request whose KV is kept, for the status page. The token is not here, because any process that
/// has the token can fetch the KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptRequest<'a> {
    /// Id of the request at the prefill engine.
    pub req: &'a RequestId,
    /// Tokens that the engine has computed.
    pub tokens: u32,
    /// Time of the engine's last step for the request.
    pub since: Time,
}

impl Store {
    /// Returns the time at which the first kept KV expires.
    pub(in crate::sender) fn deadline(&self) -> Option<Time> {
        self.kept.values().map(|k| k.term.deadline).min()
    }

    pub(in crate::sender) fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.fetched.is_empty()
    }

    /// Returns the number of requests with kept KV, and the number of their tokens.
    pub(in crate::sender) fn gauges(&self) -> (u32, u64) {
        let tokens = self.kept.values().map(|k| u64::from(k.upto)).sum();
        (u32::try_from(self.kept.len()).unwrap_or(u32::MAX), tokens)
    }

    pub(super) fn insert(&mut self, token: Token, kept: Kept) {
        self.changes += 1;
        self.kept.insert(token, kept);
    }

    pub(super) fn remove(&mut self, token: &Token) -> Option<Kept> {
        self.changes += 1;
        self.kept.remove(token)
    }

    /// Returns true if the engine keeps KV under this request id.
    pub(in crate::sender) fn has(&self, req: &RequestId) -> bool {
        self.kept.values().any(|k| k.req == *req)
    }

    pub(super) fn bury(&mut self, token: Token, reason: Reason) {
        self.ended.push_back((token, reason));
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
    }

    /// Returns the reason why a token has ended; `NotKept` if the token is unknown.
    pub(super) fn end_of(&self, token: &Token) -> Reason {
        let end = self.ended.iter().rev().find(|(known, _)| known == token);
        end.map_or(Reason::NotKept, |(_, reason)| *reason)
    }

    pub(super) fn token_of(&self, engine: EngineId, req: &RequestId) -> Option<Token> {
        let mut kept = self.kept.iter();
        let found = kept.find(|(_, k)| k.engine == engine && k.req == *req);
        found.map(|(token, _)| token.clone())
    }
}

impl Sender {
    /// Returns the requests whose KV is kept now, in no order.
    pub fn kept(&self) -> impl Iterator<Item = KeptRequest<'_>> {
        let max_keep = u64::try_from(self.config.max_keep.as_micros()).unwrap_or(u64::MAX);
        self.store.kept.values().map(move |kept| KeptRequest {
            req: &kept.req,
            tokens: kept.upto,
            since: Time(kept.term.limit.0.saturating_sub(max_keep)),
        })
    }

    /// Returns the number of requests with KV that is kept, or that a decode side is fetching.
    pub fn unfetched(&self) -> u32 {
        let requests = self.store.kept.len() + self.store.fetched.len();
        u32::try_from(requests).unwrap_or(u32::MAX)
    }

    /// Returns a number that changes with each change of [`Sender::kept`].
    pub fn kept_changes(&self) -> u64 {
        self.store.changes
    }
}

/// Number of ended tokens that the sender remembers. A busy instance ends this many tokens in a few
/// seconds.
const REMEMBERED: usize = 1024;
