//! Token counts in an engine's answer.

use serde::Deserialize;

/// The `usage` object of an answer, with the fields that the proxy logs. The newer endpoints have other names for
/// the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "Raw")]
pub(crate) struct Usage {
    /// Number of tokens of the prompt.
    pub prompt_tokens: u64,
    /// Number of tokens of the answer; 0 if absent.
    pub completion_tokens: u64,
    /// Details of the prompt; `None` if the engine does not give them
    /// (`--enable-prompt-tokens-details`).
    pub prompt_tokens_details: Option<Details>,
}

/// The `usage` object as it stands in the answer.
#[derive(Deserialize)]
struct Raw {
    #[serde(alias = "input_tokens")]
    prompt_tokens: u64,
    #[serde(default, alias = "output_tokens")]
    completion_tokens: u64,
    #[serde(default, alias = "input_tokens_details")]
    prompt_tokens_details: Option<Details>,
    /// Only `/v1/messages`: number of cached tokens, which `input_tokens` does not contain.
    #[serde(default)]
    cache_read_input_tokens: Option<u64>,
    /// Only `/v1/messages`: number of tokens put into the cache, which `input_tokens` does not contain.
    #[serde(default)]
    cache_creation_input_tokens: Option<u64>,
}

impl From<Raw> for Usage {
    fn from(raw: Raw) -> Self {
        let (read, written) = (raw.cache_read_input_tokens, raw.cache_creation_input_tokens);
        let others = read.unwrap_or_default() + written.unwrap_or_default();
        let details = Details {
            cached_tokens: read,
            written_tokens: written,
        };
        Self {
            prompt_tokens: raw.prompt_tokens + others,
            completion_tokens: raw.completion_tokens,
            prompt_tokens_details: raw.prompt_tokens_details.or(read.map(|_| details)),
        }
    }
}

/// Details of a prompt's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct Details {
    /// Number of tokens that came from a cache and were not computed; `None` if not given.
    #[serde(default)]
    pub cached_tokens: Option<u64>,
    /// Number of tokens that were computed and put into the cache; `None` if not given.
    #[serde(default, alias = "created_cache_tokens", alias = "cache_write_tokens")]
    pub written_tokens: Option<u64>,
}

/// Finds the last `usage` object in the tail of a JSON or event-stream body.
///
/// Text that the model generates cannot be mistaken for the object: the quotes inside a JSON string are
/// escaped.
pub(crate) fn find(body: &[u8]) -> Option<Usage> {
    let tail = &body[body.len().saturating_sub(TAIL_BYTES)..];
    let start = tail
        .windows(KEY.len())
        .enumerate()
        .rev()
        .find(|(at, window)| *window == KEY && (*at == 0 || tail[at - 1] != b'\\'))
        .map(|(at, _)| at + KEY.len())?;
    serde_json::Deserializer::from_slice(&tail[start..])
        .into_iter::<Usage>()
        .next()?
        .ok()
}

const KEY: &[u8] = b"\"usage\":";

/// Number of bytes at the end of a body that are searched for `usage`. These bytes include the
/// fields that engines write after `usage`, such as transfer parameters with their lists of blocks.
pub(crate) const TAIL_BYTES: usize = 4096;

/// Number of bytes at the end of a stream that are searched: the last event before `[DONE]` has only
/// `usage`.
pub(crate) const STREAM_TAIL_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds() {
        let check = |body: &str, expect: Option<(u64, u64)>| {
            let found = find(body.as_bytes()).map(|u| (u.prompt_tokens, u.completion_tokens));
            assert_eq!(found, expect, "{body}");
        };
        check(
            r#"{"id":"x","usage":{"prompt_tokens":5,"total_tokens":6,"completion_tokens":1},"k":null}"#,
            Some((5, 1)),
        );
        check(
            r#"{"usage": {"prompt_tokens": 7, "completion_tokens": null_}"#,
            None,
        );
        check(
            "data: {\"usage\":null}\n\ndata: {\"usage\": {\"prompt_tokens\": 3, \"completion_tokens\": 4}}\n\ndata: [DONE]\n\n",
            Some((3, 4)),
        );
        check(r#"{"text":"\"usage\":{\"prompt_tokens\":9}"}"#, None);
        check(
            r#"{"usage":{"input_tokens":2,"output_tokens":4,"cache_read_input_tokens":5}}"#,
            Some((7, 4)),
        );
        check("", None);
        check(r#"{"usage":"#, None);
    }
}
