//! Token counts, as an engine's answer gives them.

use serde::Deserialize;

/// OpenAI's `usage` object, as far as it is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    #[serde(default)]
    pub completion_tokens: u64,
    /// More about the prompt, if the engine tells it (`--enable-prompt-tokens-details`).
    #[serde(default)]
    pub prompt_tokens_details: Option<Details>,
}

/// More about a prompt's tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Details {
    /// Those that were cached and not computed.
    #[serde(default)]
    pub cached_tokens: Option<u64>,
}

/// Finds the last `usage` object in the tail of a JSON or event-stream body.
///
/// Text of the model cannot be mistaken for it: inside a JSON string its quotes are escaped.
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

/// `usage` and what engines write after it, transfer parameters with their blocks for one.
pub(crate) const TAIL_BYTES: usize = 4096;

/// The same in a stream, whose last event but `[DONE]` has nothing else.
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
        check("", None);
        check(r#"{"usage":"#, None);
    }
}
