//! How one instance among several is chosen.

use std::fmt;
use std::sync::Arc;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::fleet::instance::Instance;
use crate::fleet::load::LoadSnapshot;

/// How an instance among equals is chosen, for prefill and decode separately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// In turn.
    #[default]
    RoundRobin,
    /// The one with the fewest tokens under way.
    LeastTokens,
    /// The same one for all requests of a session; without a session, as `least-tokens`.
    Session,
    /// The one that is done first, if what it holds of the prompt costs nothing.
    Prefix,
}

/// One instance that could be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Who.
    pub instance: &'a Arc<Instance>,
    /// How busy.
    pub load: LoadSnapshot,
    /// Tokens of this prompt that it holds already, as far as is known.
    pub held: u64,
}

/// What a choice depends on beside the candidates.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// Requests so far: who is in turn, also among equals of the other policies.
    pub turn: usize,
    /// The session, hashed.
    pub session: Option<u64>,
    /// The prompt's length, as estimated.
    pub prompt_tokens: u64,
}

impl Policy {
    /// Chooses; `None` if there is nobody.
    pub fn choose<'a>(
        self,
        candidates: &[Candidate<'a>],
        request: Request,
    ) -> Option<Candidate<'a>> {
        let first = request.turn.checked_rem(candidates.len())?;
        // In turn from `first` on, so that equals are taken in turn.
        let in_turn = || {
            candidates[first..]
                .iter()
                .chain(&candidates[..first])
                .copied()
        };
        match (self, request.session) {
            (Self::RoundRobin, _) => in_turn().next(),
            (Self::Session, Some(session)) => {
                // Rendezvous hashing: when an instance goes, only its own sessions move.
                let weight =
                    |c: &Candidate<'_>| xxh3_64_with_seed(c.instance.id.as_bytes(), session);
                in_turn().max_by_key(weight)
            }
            (Self::LeastTokens | Self::Session, _) => in_turn().min_by_key(|c| c.load.tokens),
            (Self::Prefix, _) => in_turn().min_by_key(|c| {
                let missing = request.prompt_tokens.saturating_sub(c.held);
                c.load.tokens.saturating_add(missing)
            }),
        }
    }

    /// The name in flags and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RoundRobin => "round-robin",
            Self::LeastTokens => "least-tokens",
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
