//! Which instances a request goes to: a pure function of who is there and what is asked.

use std::fmt;
use std::sync::Arc;

use crate::error::{ApiError, Code};
use crate::instance::Instance;

/// What routing needs to know of a request.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// Why the request is not split over two instances; `None` if it may be.
    pub alone: Option<Alone>,
    /// How a place among equals is chosen, for prefill and decode separately.
    pub policy: Policy,
    /// Decode instances that have failed this request already.
    pub failed: &'a [String],
}

/// How one instance among several is chosen. New policies are new variants; each reads only the
/// instances and what it carries, so that [`route`] stays a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// In turn: the caller counts the requests of each kind.
    RoundRobin {
        /// Requests so far that had a prefill leg.
        prefill_turn: usize,
        /// Requests so far.
        decode_turn: usize,
    },
}

/// The instances of a request.
#[derive(Clone, Debug)]
pub struct Pair {
    /// Where it is decoded.
    pub decode: Arc<Instance>,
    /// Where it is prefilled, or why nowhere else than on the decode instance.
    pub prefill: Result<Arc<Instance>, Alone>,
    /// The reason of the choice, for the log line.
    pub choice: Choice,
}

/// The reason of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Prefill instances to choose from.
    pub prefills: usize,
    /// Decode instances to choose from.
    pub decodes: usize,
    /// How it was chosen.
    pub policy: Policy,
}

/// Why a request is computed by its decode instance alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Alone {
    /// No prefill instance is ready (other than the decode instance itself).
    NoPrefill,
    /// `n`, `best_of` or beam search make several engine requests of it.
    ManySequences,
    /// A list of several prompts makes several engine requests of it.
    ManyPrompts,
    /// Log probabilities of the prompt need the prompt computed where they are returned.
    PromptLogprobs,
    /// Prompt embeddings: equal token hashes for different KV.
    PromptEmbeds,
    /// Images, audio or video: equal token hashes for different KV.
    Multimodal,
    /// A salt separates caches: equal token hashes for KV that must not be shared.
    CacheSalt,
    /// Nothing is to be generated.
    NothingToDecode,
    /// The prefill instance could not be reached or died before it had begun.
    PrefillDied,
    /// The prefill instance answered with an error of its own before it had begun.
    PrefillError,
    /// The prefill instance was too busy.
    PrefillBusy,
    /// The prefill instance did not begin in time.
    PrefillTimeout,
    /// The prefill instance computed the prompt, but its KV is not pushed: its connector does not serve
    /// such a request, or its sidecar refused it.
    NotPushed,
    /// Another decode instance takes over; the KV went to the first.
    DecodeRetry,
}

/// Nothing can take the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    /// Nobody with a decode role has registered.
    #[error("no decode instance is registered")]
    NoDecode,
    /// Decode instances are there, but none is ready.
    #[error("none of the {0} registered decode instances is ready")]
    NoneReady(usize),
    /// Every ready decode instance has failed this request.
    #[error("every ready decode instance has failed this request")]
    AllFailed,
}

/// Chooses the instances of a request.
///
/// # Errors
/// No decode instance can take it.
pub fn route(instances: &[Arc<Instance>], ask: &Ask<'_>) -> Result<Pair, NoRoute> {
    let registered = instances.iter().filter(|i| i.decodes()).count();
    let ready: Vec<_> = instances
        .iter()
        .filter(|i| i.decodes() && i.is_ready())
        .collect();
    let decodes: Vec<_> = ready
        .iter()
        .filter(|i| !ask.failed.contains(&i.id))
        .collect();
    let Policy::RoundRobin {
        prefill_turn,
        decode_turn,
    } = ask.policy;
    let Some(decode) = in_turn(&decodes, decode_turn) else {
        return Err(match (registered, ready.len()) {
            (0, _) => NoRoute::NoDecode,
            (_, 0) => NoRoute::NoneReady(registered),
            _ => NoRoute::AllFailed,
        });
    };
    let prefills: Vec<_> = instances
        .iter()
        .filter(|i| i.prefills() && i.is_ready() && i.id != decode.id)
        .collect();
    let prefill = match (ask.alone, in_turn(&prefills, prefill_turn)) {
        (Some(alone), _) => Err(alone),
        (None, None) => Err(Alone::NoPrefill),
        (None, Some(prefill)) => Ok(Arc::clone(prefill)),
    };
    Ok(Pair {
        decode: Arc::clone(decode),
        prefill,
        choice: Choice {
            prefills: prefills.len(),
            decodes: decodes.len(),
            policy: ask.policy,
        },
    })
}

fn in_turn<T>(places: &[T], turn: usize) -> Option<&T> {
    places.get(turn.checked_rem(places.len())?)
}

impl Alone {
    /// Every reason, for metrics that want their label values to exist from the start.
    pub const ALL: [Self; 14] = [
        Self::NoPrefill,
        Self::ManySequences,
        Self::ManyPrompts,
        Self::PromptLogprobs,
        Self::PromptEmbeds,
        Self::Multimodal,
        Self::CacheSalt,
        Self::NothingToDecode,
        Self::PrefillDied,
        Self::PrefillError,
        Self::PrefillBusy,
        Self::PrefillTimeout,
        Self::NotPushed,
        Self::DecodeRetry,
    ];

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoPrefill => "no_prefill",
            Self::ManySequences => "many_sequences",
            Self::ManyPrompts => "many_prompts",
            Self::PromptLogprobs => "prompt_logprobs",
            Self::PromptEmbeds => "prompt_embeds",
            Self::Multimodal => "multimodal",
            Self::CacheSalt => "cache_salt",
            Self::NothingToDecode => "nothing_to_decode",
            Self::PrefillDied => "prefill_died",
            Self::PrefillError => "prefill_error",
            Self::PrefillBusy => "prefill_busy",
            Self::PrefillTimeout => "prefill_timeout",
            Self::NotPushed => "not_pushed",
            Self::DecodeRetry => "decode_retry",
        }
    }
}

impl From<NoRoute> for ApiError {
    fn from(error: NoRoute) -> Self {
        let code = match error {
            NoRoute::NoDecode => Code::NoDecode,
            NoRoute::NoneReady(_) => Code::NoneReady,
            NoRoute::AllFailed => Code::DecodeUnreachable,
        };
        Self::new(code, error.to_string())
    }
}

impl fmt::Display for Alone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Policy::RoundRobin { .. } = self.policy;
        write!(f, "round_robin({}p,{}d)", self.prefills, self.decodes)
    }
}

#[cfg(test)]
mod tests;
