//! Policies that choose one instance among several.

use std::fmt;
use std::sync::Arc;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::fleet::instance::Instance;
use crate::fleet::load::LoadSnapshot;

/// Policy that chooses an instance, separately for prefill and decode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Instances in turn.
    #[default]
    RoundRobin,
    /// The instance with the fewest tokens in flight.
    LeastTokens,
    /// The instance with the fewest requests in flight.
    LeastRequests,
    /// The same instance for all requests of a session; without a session, as `least-tokens`.
    Session,
    /// The instance with the fewest tokens to compute: the tokens in flight, plus the tokens of the
    /// prompt that the instance does not hold.
    Prefix,
}

/// An instance that could be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The instance.
    pub instance: &'a Arc<Instance>,
    /// Load of the instance.
    pub load: LoadSnapshot,
    /// Number of tokens of this prompt that the instance is known to hold; 0 if none.
    pub held: u64,
}

/// The properties of a request on which a choice depends, in addition to the candidates.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// Number of requests so far. With `RoundRobin`, this number decides which instance is next. With the
    /// other policies, this number decides which of several equal candidates is next.
    pub turn: usize,
    /// Hash of the session; `None` if the request names none.
    pub session: Option<u64>,
    /// Estimated length of the prompt in tokens.
    pub prompt_tokens: u64,
}

impl Policy {
    /// Chooses one of the candidates; `None` if there are none.
    pub fn choose<'a>(
        self,
        candidates: &[Candidate<'a>],
        request: Request,
    ) -> Option<Candidate<'a>> {
        let first = request.turn.checked_rem(candidates.len())?;
        // The order begins at `first`, so that equal candidates are chosen in turn.
        let in_turn = || {
            candidates[first..]
                .iter()
                .chain(&candidates[..first])
                .copied()
        };
        match (self, request.session) {
            (Self::RoundRobin, _) => in_turn().next(),
            (Self::Session, Some(session)) => {
                // Rendezvous hashing: if an instance disappears, only its own sessions move to another
                // instance.
                let weight =
                    |c: &Candidate<'_>| xxh3_64_with_seed(c.instance.id.as_bytes(), session);
                in_turn().max_by_key(weight)
            }
            (Self::LeastTokens | Self::Session, _) => in_turn().min_by_key(|c| c.load.tokens),
            (Self::LeastRequests, _) => in_turn().min_by_key(|c| c.load.legs),
            (Self::Prefix, _) => in_turn().min_by_key(|c| {
                let missing = request.prompt_tokens.saturating_sub(c.held);
                c.load.tokens.saturating_add(missing)
            }),
        }
    }

    /// Returns true if a choice depends on the session that a request names.
    pub fn reads_sessions(self) -> bool {
        self == Self::Session
    }

    /// Returns true if a choice depends on the prefixes that instances hold, so that prompts have to be
    /// remembered.
    pub fn reads_prefixes(self) -> bool {
        self == Self::Prefix
    }

    /// Returns the name in flags and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::LeastTokens => "least-tokens",
            Self::LeastRequests => "least-requests",
            Self::Session => "session",
            Self::Prefix => "prefix",
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connectors::Connector;
    use crate::fleet::instance::{Named, Source};
    use protocol::registration::InstanceRole;

    #[test]
    fn least_requests() {
        let instance = |id: &str| {
            let named = Named {
                role: InstanceRole::Decode,
                url: format!("http://{id}:1"),
                id: Some(id.into()),
                connector: Connector::Nixl,
                host: None,
                init_ports: Vec::new(),
                alloc_ports: Vec::new(),
                zmq: None,
                models: Vec::new(),
            };
            Arc::new(Instance::named(&named, Source::Configured).unwrap())
        };
        let all = ["a", "b", "c"].map(instance);
        let check = |policy: Policy, turn, expect: &str| {
            let loads = [(9, 1), (2, 2), (3, 1)];
            let candidates: Vec<_> = all
                .iter()
                .zip(loads)
                .map(|(instance, (tokens, legs))| Candidate {
                    instance,
                    load: LoadSnapshot {
                        tokens,
                        legs,
                        is_open: false,
                    },
                    held: 0,
                })
                .collect();
            let request = Request {
                turn,
                ..Request::default()
            };
            let chosen = policy.choose(&candidates, request).unwrap();
            assert_eq!(chosen.instance.id, expect, "{policy} {turn}");
        };
        check(Policy::LeastTokens, 0, "b");
        // Two instances have one request each: they are chosen in turn.
        check(Policy::LeastRequests, 0, "a");
        check(Policy::LeastRequests, 1, "c");
        check(Policy::LeastRequests, 2, "c");
    }
}
