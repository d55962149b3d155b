//! The hand-over of the first token. Both legs are completions whose prompts are token ids. The decode
//! leg's prompt ends with the token that the prefill instance has sampled.
//!
//! If the hand-over of the first token would change the answer to a request, the request gets no
//! transfer to LMCache; between sidecars the request gets the usual transfer.

use bytes::Bytes;
use serde::Deserialize;

use crate::connectors::answer::FirstToken;
use crate::openai::body::{Kind, RequestBody, kind};
use crate::openai::endpoint::Endpoint;
use crate::openai::tokenize;

pub(crate) mod merge;
pub(crate) mod stream;

/// Returns true if the request keeps its meaning when the answer's first token becomes part of the
/// prompt. Returns false for a request with an unknown field, because an unknown field may mean
/// anything.
pub(crate) fn can_express(body: &RequestBody, endpoint: Endpoint) -> bool {
    if !matches!(endpoint, Endpoint::Completions | Endpoint::Chat) {
        return false;
    }
    let is_set = |name: &str| match body.json(name) {
        // In a completion, `logprobs: 0` is not empty: it asks for the log probability of the sampled
        // token.
        Some(text) if name == "logprobs" => text != "false",
        Some(text) => !EMPTY.contains(&text),
        None => false,
    };
    let needs_whole = |name: &str| match kind(name) {
        Some(Kind::Tokenized | Kind::Asker | Kind::Sampling | Kind::Frame) => false,
        // Without tools, `tool_choice` has no effect; with tools, the field `tools` already prevents
        // the hand-over.
        Some(Kind::Prompt) if name == "tool_choice" => false,
        Some(Kind::Prompt | Kind::Answer) => is_set(name),
        None => true,
    };
    // An engine seeds its random numbers at the beginning of each request. So the decode leg of a
    // request with a seed would repeat the random numbers of the prefill leg.
    let is_seeded = body.json("seed").is_some()
        && !body
            .json("temperature")
            .is_some_and(|text| EMPTY.contains(&text));
    let is_clear = COUNTS.iter().all(|name| {
        body.json(name)
            .is_none_or(|text| text.parse::<u64>().is_ok())
    });
    let is_one = body.max_tokens(endpoint).is_some_and(|tokens| tokens <= 1);
    let is_plain = is_clear && !is_seeded && !is_one && !body.names().any(needs_whole);
    // The token ids of a prompt do not contain its images, and only one prompt can end with the first token.
    is_plain && body.sidecars_only(endpoint).is_none()
}

/// Returns the body of `POST /tokenize`; `None` if the prompt already consists of token ids, or if the endpoint's
/// requests never continue after their first token.
pub(crate) fn tokenize_body(body: &RequestBody, endpoint: Endpoint) -> Option<Bytes> {
    if endpoint == Endpoint::Completions && token_ids(body).is_some() {
        return None;
    }
    tokenize::body_of(body, endpoint)
}

/// Returns the token ids of an answer to `POST /tokenize`, as JSON; `None` if the answer has no token
/// ids.
pub(crate) fn tokens(answer: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow)]
        tokens: &'a serde_json::value::RawValue,
    }
    let answer: Answer<'_> = serde_json::from_slice(answer).ok()?;
    let text = answer.tokens.get();
    text.starts_with('[').then(|| text.to_owned())
}

/// Returns the prompt as JSON if it consists of token ids; `None` otherwise.
pub(crate) fn token_ids(body: &RequestBody) -> Option<&str> {
    let text = body.json("prompt")?;
    let first = text.strip_prefix('[')?.trim_start();
    first
        .starts_with(|c: char| c.is_ascii_digit())
        .then_some(text)
}

/// Returns the body of the prefill leg: a completion of one token for the prompt `tokens`.
pub(crate) fn prefill_body(body: &RequestBody, tokens: &str, params: &str) -> Bytes {
    let mut set = vec![
        ("prompt", tokens),
        ("stream", "false"),
        ("max_tokens", "1"),
        ("kv_transfer_params", params),
    ];
    set.extend(body.first_of_min_tokens());
    body.with(is_of_both, &set)
}

/// Returns the body of the decode leg: a completion that continues after the first token.
pub(crate) fn decode_body(
    body: &RequestBody,
    endpoint: Endpoint,
    tokens: &str,
    first: &FirstToken,
    params: Option<&str>,
) -> Bytes {
    let all = tokens.trim_ascii_end();
    let open = all.strip_suffix(']').unwrap_or(all).trim_ascii_end();
    let prompt = format!("{open},{}]", first.id);
    let left = match body.max_tokens(endpoint) {
        Some(tokens) => (tokens - 1).to_string(),
        // Without `max_tokens`, a completion ends after OpenAI's default of 16 tokens, and the prefill
        // leg has sampled the first of them. A chat may continue to the end of the context.
        None if endpoint == Endpoint::Completions => "15".to_owned(),
        None => "null".to_owned(),
    };
    let mut set = vec![("prompt", prompt.as_str()), ("max_tokens", left.as_str())];
    let least = body
        .json("min_tokens")
        .and_then(|text| text.parse::<u64>().ok());
    let least = least.map(|least| least.saturating_sub(1).to_string());
    set.extend(least.as_deref().map(|least| ("min_tokens", least)));
    set.extend(params.map(|params| ("kv_transfer_params", params)));
    body.with(|name| is_of_both(name) || FORM.contains(&name), &set)
}

/// Returns true for fields that both legs contain.
fn is_of_both(name: &str) -> bool {
    name == "model" || matches!(kind(name), Some(Kind::Asker | Kind::Sampling))
}

/// Values that mean the same as an absent field.
const EMPTY: [&str; 6] = ["false", "0", "0.0", "[]", "{}", "\"none\""];

/// Fields whose numbers are divided between the legs.
const COUNTS: [&str; 3] = ["max_tokens", "max_completion_tokens", "min_tokens"];

/// Fields of the answer's form, which the decode leg takes from the client's request.
const FORM: [&str; 4] = ["stream", "stream_options", "stream_interval", "request_id"];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> RequestBody {
        RequestBody::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    #[test]
    fn what_can_be_handed_over() {
        let check = |endpoint, text: &str, expect: bool| {
            assert_eq!(can_express(&parse(text), endpoint), expect, "{text}");
        };
        let completion = Endpoint::Completions;
        check(
            completion,
            r#"{"prompt":"a","max_tokens":2,"temperature":0.5}"#,
            true,
        );
        check(completion, r#"{"prompt":"a","max_tokens":1}"#, false);
        check(completion, r#"{"prompt":"a","n":2}"#, false);
        check(completion, r#"{"prompt":"a","n":1}"#, true);
        check(completion, r#"{"prompt":"a","stop":"x"}"#, false);
        check(
            completion,
            r#"{"prompt":"a","stop":[],"logprobs":null,"presence_penalty":0.0}"#,
            true,
        );
        check(completion, r#"{"prompt":"a","logprobs":0}"#, false);
        check(
            completion,
            r#"{"prompt":"a","frequency_penalty":0.5}"#,
            false,
        );
        check(completion, r#"{"prompt":"a","seed":1}"#, false);
        check(
            completion,
            r#"{"prompt":"a","seed":1,"temperature":0}"#,
            true,
        );
        check(
            Endpoint::Chat,
            r#"{"messages":[],"max_completion_tokens":1}"#,
            false,
        );
        check(Endpoint::Chat, r#"{"messages":[],"tools":[{}]}"#, false);
        check(Endpoint::Chat, r#"{"messages":[],"documents":[{}]}"#, false);
        check(
            completion,
            r#"{"prompt":"a","thinking_token_budget":5}"#,
            false,
        );
        check(
            completion,
            r#"{"prompt":"a","of_the_next_version":5}"#,
            false,
        );
        check(completion, r#"{"prompt":"a","max_tokens":"5"}"#, false);
        check(
            completion,
            r#"{"prompt":"a","metadata":{"a":"b"},"user":"u"}"#,
            true,
        );
        check(
            Endpoint::Chat,
            r#"{"messages":[],"tools":[],"stream":true}"#,
            true,
        );
    }

    #[test]
    fn legs() {
        let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).unwrap();
        let body = parse(r#"{"model":"m","messages":[{}],"max_tokens":8,"seed":1,"stream":true}"#);
        assert_eq!(
            text(tokenize_body(&body, Endpoint::Chat).unwrap()),
            r#"{"model":"m","messages":[{}]}"#
        );
        assert_eq!(
            text(prefill_body(&body, "[1,2]", "{}")),
            r#"{"model":"m","seed":1,"prompt":[1,2],"stream":false,"max_tokens":1,"kv_transfer_params":{}}"#
        );
        let first = FirstToken {
            id: 7,
            ..FirstToken::default()
        };
        assert_eq!(
            text(decode_body(&body, Endpoint::Chat, "[1,2] ", &first, None)),
            r#"{"model":"m","seed":1,"stream":true,"prompt":[1,2,7],"max_tokens":7}"#
        );
        let ids = parse(r#"{"model":"m","prompt":[1, 2]}"#);
        assert_eq!(tokenize_body(&ids, Endpoint::Completions), None);
        assert_eq!(token_ids(&ids), Some("[1, 2]"));
        assert_eq!(
            tokens(br#"{"count":2,"tokens":[3, 4]}"#).as_deref(),
            Some("[3, 4]")
        );
        assert_eq!(tokens(br#"{"tokens":null}"#), None);
    }
}
