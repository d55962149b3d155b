//! The fields of OpenAI's, Anthropic's and vLLM's requests, sorted by the part of a request that they concern.
//!
//! A prefill leg keeps the fields that decide the prompt and leaves out the fields that concern the
//! generation. The leg also keeps unknown fields. If the leg left out an unknown field that decides the
//! prompt, the decode engine would get the KV of another prompt. If the leg keeps an unknown field that
//! concerns the generation, the engine refuses at most one leg (`Fallback::PrefillRefused`).
//! `tests/processes/test_fields.py` compares the table with vLLM's own models.

/// The part of a request that a field concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The prompt; `/tokenize` reads the field, too.
    Tokenized,
    /// The prompt or the engine's extensions; only the engine knows what the field does.
    Prompt,
    /// The client. Fields that vLLM ignores also have this kind.
    Asker,
    /// The sampling of each single token.
    Sampling,
    /// Several tokens of the answer together, or data that the answer contains in addition to its text.
    Answer,
    /// The answer's length and form, which differ between the legs.
    Frame,
}

use Kind::{Answer, Asker, Frame, Prompt, Sampling, Tokenized};

/// Returns a field's name as a constant, and its kind; `None` if the field is unknown.
pub(super) fn known(name: &str) -> Option<(&'static str, Kind)> {
    KINDS.iter().find_map(|(kind, names)| {
        let name = names.iter().find(|known| **known == name)?;
        Some((*name, *kind))
    })
}

/// Returns the kind of a field; `None` if the field is unknown.
pub(crate) fn kind(name: &str) -> Option<Kind> {
    known(name).map(|(_, kind)| kind)
}

/// All known fields. The most frequent kinds come first, because a lookup compares the name with one
/// entry after the other.
const KINDS: [(Kind, &[&str]); 6] = [
    (
        Tokenized,
        &[
            "model",
            "prompt",
            "messages",
            "add_generation_prompt",
            "continue_final_message",
            "add_special_tokens",
            "chat_template",
            "chat_template_kwargs",
        ],
    ),
    (
        Frame,
        &[
            "stream",
            "stream_options",
            "stream_interval",
            "max_tokens",
            "max_completion_tokens",
            "max_output_tokens",
            "background",
            "min_tokens",
            "n",
            "best_of",
            "length_penalty",
            "parallel_tool_calls",
            "request_id",
            "return_token_offsets",
            "mm_payload",
            "return_mm_kwargs",
            "kv_transfer_params",
        ],
    ),
    (
        Sampling,
        &[
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
            "repetition_penalty",
            "logit_bias",
            "allowed_token_ids",
            "stop_token_ids",
            "include_stop_str_in_output",
            "ignore_eos",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ],
    ),
    (
        Prompt,
        &[
            "tools",
            "tool_choice",
            "functions",
            "function_call",
            "documents",
            "reasoning_effort",
            "media_io_kwargs",
            "mm_processor_kwargs",
            "truncate_prompt_tokens",
            "truncation_side",
            // Fill in the middle: the engine puts the suffix into the prompt.
            "suffix",
            "prompt_embeds",
            "cache_salt",
            "ec_transfer_params",
            "vllm_xargs",
            // `/v1/messages`
            "system",
            "thinking",
            "output_config",
            // `/v1/responses`
            "input",
            "instructions",
            "previous_input_messages",
            "previous_response_id",
            "reasoning",
            "truncation",
        ],
    ),
    (
        Asker,
        &[
            "user",
            "priority",
            "session_id",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "metadata",
            "store",
        ],
    ),
    (
        Answer,
        &[
            "stop",
            "stop_sequences",
            "bad_words",
            "presence_penalty",
            "frequency_penalty",
            "logprobs",
            "top_logprobs",
            "logprob_token_ids",
            "prompt_logprobs",
            "echo",
            "use_beam_search",
            "watermarking",
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "include_reasoning",
            "thinking_token_budget",
            "repetition_detection",
            "return_tokens_as_token_ids",
            "return_token_ids",
            "return_prompt_text",
            "routed_experts_prompt_start",
            "text",
            "include",
            "max_tool_calls",
            "enable_response_messages",
        ],
    ),
];
