//! Why a request gets no transfer.

use std::fmt;

/// Why a request is computed by its decode instance alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fallback {
    /// No prefill instance is ready (other than the decode instance itself).
    NoPrefill,
    /// Prefill instances are ready, but none fits the decode instance: their KV has another shape, or
    /// one of the two engines moves none.
    Unfit,
    /// Each prefill instance is known to refuse such a request: it has refused one before.
    RefusedBefore,
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
    /// The prefill engine refused a request with fields that this proxy does not know: its leg of one
    /// token may be to blame, and not the client.
    PrefillRefused,
    /// The prefill instance was too busy.
    PrefillBusy,
    /// The prefill instance did not begin in time.
    PrefillTimeout,
    /// The prefill instance computed the prompt, but its KV is not pushed: its connector does not serve
    /// such a request, or its sidecar refused it.
    NotPushed,
    /// Another decode instance takes over; the KV went to the first.
    DecodeRetry,
    /// A later turn goes straight to the decode instance that has the conversation (mode `ppd`).
    LaterTurn,
    /// The decode instance is expected to be done sooner without a transfer (mode `auto`).
    Cheaper,
    /// LMCache's first-token hand-over cannot express the request.
    NotExpressible,
}

impl Fallback {
    /// Every reason, for metrics that want their label values to exist from the start.
    pub const ALL: [Self; 20] = [
        Self::NoPrefill,
        Self::Unfit,
        Self::RefusedBefore,
        Self::ManySequences,
        Self::ManyPrompts,
        Self::PromptLogprobs,
        Self::PromptEmbeds,
        Self::Multimodal,
        Self::CacheSalt,
        Self::NothingToDecode,
        Self::PrefillDied,
        Self::PrefillError,
        Self::PrefillRefused,
        Self::PrefillBusy,
        Self::PrefillTimeout,
        Self::NotPushed,
        Self::DecodeRetry,
        Self::LaterTurn,
        Self::Cheaper,
        Self::NotExpressible,
    ];

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoPrefill => "no_prefill",
            Self::Unfit => "unfit",
            Self::RefusedBefore => "refused_before",
            Self::ManySequences => "many_sequences",
            Self::ManyPrompts => "many_prompts",
            Self::PromptLogprobs => "prompt_logprobs",
            Self::PromptEmbeds => "prompt_embeds",
            Self::Multimodal => "multimodal",
            Self::CacheSalt => "cache_salt",
            Self::NothingToDecode => "nothing_to_decode",
            Self::PrefillDied => "prefill_died",
            Self::PrefillError => "prefill_error",
            Self::PrefillRefused => "prefill_refused",
            Self::PrefillBusy => "prefill_busy",
            Self::PrefillTimeout => "prefill_timeout",
            Self::NotPushed => "not_pushed",
            Self::DecodeRetry => "decode_retry",
            Self::LaterTurn => "later_turn",
            Self::Cheaper => "cheaper",
            Self::NotExpressible => "not_expressible",
        }
    }
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
