//! The reasons for which a request gets no transfer.

use std::fmt;

/// The reason for which the decode instance computes a request alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fallback {
    /// No instance other than the decode instance itself is ready for prefill.
    NoPrefill,
    /// Prefill instances are ready, but none fits the decode instance: the KV of the two instances has
    /// different shapes, or one of the two engines moves no KV.
    Unfit,
    /// Each prefill instance has refused a request of this kind before.
    RefusedBefore,
    /// `best_of`, beam search or a tool that the engine itself runs turns the request into several engine
    /// requests. `n` also turns it into several engine requests if the instances have no sidecars.
    ManySequences,
    /// A list of prompts turns the request into several engine requests, and the instances have no sidecars.
    ManyPrompts,
    /// The request asks for log probabilities of the prompt, so the engine that answers has to compute
    /// the prompt.
    PromptLogprobs,
    /// The prompt consists of embeddings, so equal token hashes do not mean equal KV.
    PromptEmbeds,
    /// The request has images, audio or video, and the instances have no sidecars. Or the client names one of
    /// them by `uuid`, which only one of the engines may know.
    Multimodal,
    /// The request has a cache salt, and an instance uses LMCache, whose keys do not contain the salt.
    CacheSalt,
    /// The request wants zero generated tokens.
    NothingToDecode,
    /// The prefill instance could not be reached, or died before it had answered.
    PrefillDied,
    /// The prefill instance answered with an error that is not the request's fault.
    PrefillError,
    /// The prefill engine refused a stream, or a request with fields that this proxy does not know. A
    /// single vLLM may answer otherwise: the leg differs from the client's request, because the leg asks
    /// for one token and is not streamed.
    PrefillRefused,
    /// The prefill instance was too busy.
    PrefillBusy,
    /// The prefill instance did not begin in time.
    PrefillTimeout,
    /// The prefill instance computed the prompt, but did not hand the KV over: its connector does not
    /// support requests of this kind, or its sidecar refused the push.
    NotPushed,
    /// Another decode instance takes over, but the KV went to the first decode instance.
    DecodeRetry,
    /// The request is a later turn and goes directly to the decode instance that has the conversation
    /// (mode `ppd`).
    LaterTurn,
    /// The decode instance is expected to finish sooner without a transfer (mode `auto`).
    Cheaper,
    /// The request cannot continue after its first token on another instance, as LMCache requires. Or its
    /// endpoint is neither completions nor chat, and an instance uses LMCache or P2P NCCL.
    NotExpressible,
    /// Requests of this endpoint are always passed whole to one decode instance.
    PassedOn,
    /// The request continues a response that one instance has stored, or the instance computes it in the
    /// background.
    StoredResponse,
}

impl Fallback {
    /// All reasons, so that metrics have all label values from the start.
    pub const ALL: [Self; 22] = [
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
        Self::PassedOn,
        Self::StoredResponse,
    ];

    /// Returns the name in metrics and logs.
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
            Self::PassedOn => "passed_on",
            Self::StoredResponse => "stored_response",
        }
    }
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
