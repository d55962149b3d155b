//! The bodies of the endpoints that came after chat completions: `/v1/messages`, `/v1/responses` and
//! `/invocations`.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{BadBody, Part, RequestBody};
use crate::openai::endpoint::Endpoint;
use crate::openai::fallback::Fallback;
use crate::openai::passed::INVOCATIONS;

impl RequestBody {
    /// Returns the endpoint whose form the body has. Only a body of `/invocations` may have the form of another
    /// endpoint; vLLM tries the forms in the same order.
    pub(crate) fn endpoint(&self, asked: Endpoint) -> Endpoint {
        match asked {
            Endpoint::Passed(passed) if passed.path == INVOCATIONS => {
                if self.is_set("messages") {
                    Endpoint::Chat
                } else if self.is_set("prompt") || self.is_set("prompt_embeds") {
                    Endpoint::Completions
                } else {
                    asked
                }
            }
            _ => asked,
        }
    }

    /// Returns the id of the stored response that the request continues, as JSON; `None` if it continues none.
    pub(crate) fn previous_response(&self) -> Option<&str> {
        self.text("previous_response_id")
    }

    /// Returns true if an engine may store the response. The client can then name the response later.
    pub(crate) fn may_be_stored(&self) -> bool {
        self.text("store").is_none() || self.is_on("store")
    }

    /// Returns the body with the request id `id`, by which the engine names its response.
    ///
    /// # Errors
    /// Does not happen: the body was a JSON object before.
    pub(crate) fn named(&self, id: &str) -> Result<Self, BadBody> {
        let id: Bytes = self.with(|_| true, &[("request_id", &format!("\"{id}\""))]);
        Self::parse(id)
    }

    /// Returns the reason for which a request of `/v1/responses` is not split; `None` if it may be split.
    pub(super) fn fallback_of_response(&self) -> Option<Fallback> {
        if self.previous_response().is_some() || self.is_on("background") {
            return Some(Fallback::StoredResponse);
        }
        let tools: Vec<Part> = self.read("tools").unwrap_or_default();
        let is_run = |tool: &Part| tool.kind.as_deref().is_none_or(|kind| kind != "function");
        if tools.iter().any(is_run) {
            // The engine calls such a tool itself, and then continues with another request.
            return Some(Fallback::ManySequences);
        }
        self.has_blocks_of_media("input")
            .then_some(Fallback::Multimodal)
    }

    /// Returns true if a block in this field, at any depth, is an image, audio, video or a file.
    pub(super) fn has_blocks_of_media(&self, field: &str) -> bool {
        let blocks: Option<&RawValue> = self.read(field);
        blocks.is_some_and(|blocks| has_media(blocks, MAX_DEPTH))
    }
}

/// A message, or a part of a message.
#[derive(Deserialize)]
struct Block<'a> {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
    #[serde(borrow, default)]
    output: Option<&'a RawValue>,
}

fn has_media(blocks: &RawValue, depth: u32) -> bool {
    let is_media = |block: &Block<'_>| {
        let kind = block.kind.as_deref().unwrap_or_default();
        let inner = [block.content, block.output];
        MEDIA.iter().any(|media| kind.contains(media))
            || (depth > 0
                && inner
                    .into_iter()
                    .flatten()
                    .any(|inner| has_media(inner, depth - 1)))
    };
    // Text, or a form that the engine refuses.
    let blocks: Vec<Block<'_>> = serde_json::from_str(blocks.get()).unwrap_or_default();
    blocks.iter().any(is_media)
}

/// Parts of the names of blocks that are not text.
const MEDIA: [&str; 6] = ["image", "audio", "video", "file", "document", "screenshot"];

/// Maximum depth of blocks in blocks: a message contains the result of a tool, which contains an image.
const MAX_DEPTH: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_that_are_not_split() {
        let check = |text: &'static str, expect: Option<Fallback>| {
            let body = RequestBody::parse(Bytes::from_static(text.as_bytes())).unwrap();
            assert_eq!(body.fallback(Endpoint::Responses), expect, "{text}");
        };
        check(r#"{"input": "hi"}"#, None);
        check(
            r#"{"input": "hi", "tools": [{"type": "function", "name": "f"}]}"#,
            None,
        );
        check(
            r#"{"input": "hi", "tools": [{"type": "web_search_preview"}]}"#,
            Some(Fallback::ManySequences),
        );
        for text in [
            r#"{"input": "hi", "previous_response_id": "resp_1"}"#,
            r#"{"input": "hi", "background": true}"#,
        ] {
            check(text, Some(Fallback::StoredResponse));
        }
        check(
            r#"{"input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, {"type": "reasoning"}]}"#,
            None,
        );
        for text in [
            r#"{"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]}"#,
            r#"{"input": [{"type": "function_call_output", "output": [{"type": "input_file"}]}]}"#,
        ] {
            check(text, Some(Fallback::Multimodal));
        }
    }

    #[test]
    fn messages_that_are_not_split() {
        let check = |content: &str, expect: Option<Fallback>| {
            let text = format!(r#"{{"messages": [{{"role": "user", "content": {content}}}]}}"#);
            let body = RequestBody::parse(text.clone().into()).unwrap();
            assert_eq!(body.fallback(Endpoint::Messages), expect, "{text}");
        };
        check(r#""hi""#, None);
        check(
            r#"[{"type": "text", "text": "hi"}, {"type": "tool_use"}]"#,
            None,
        );
        check(
            r#"[{"type": "tool_result", "content": [{"type": "text"}]}]"#,
            None,
        );
        check(r#"[{"type": "image"}]"#, Some(Fallback::Multimodal));
        check(
            r#"[{"type": "tool_result", "content": [{"type": "image"}]}]"#,
            Some(Fallback::Multimodal),
        );
    }

    #[test]
    fn invocations_have_the_form_of_another_endpoint() {
        let asked = crate::openai::passed::PASSED_ON
            .last()
            .map(Endpoint::Passed)
            .unwrap();
        let check = |text: &'static str, expect: Endpoint| {
            let body = RequestBody::parse(Bytes::from_static(text.as_bytes())).unwrap();
            assert_eq!(body.endpoint(asked), expect, "{text}");
            assert_eq!(body.endpoint(Endpoint::Messages), Endpoint::Messages);
        };
        check(r#"{"messages": [], "prompt": "a"}"#, Endpoint::Chat);
        check(r#"{"prompt": "a"}"#, Endpoint::Completions);
        check(r#"{"input": "a"}"#, asked);
    }

    #[test]
    fn prefill_legs() {
        let check = |endpoint, given: &'static str, expect: &str| {
            let body = RequestBody::parse(Bytes::from_static(given.as_bytes())).unwrap();
            let leg = body.prefill_leg(endpoint, None, super::super::PrefillAnswer::Nothing);
            assert_eq!(std::str::from_utf8(&leg).unwrap(), expect);
        };
        check(
            Endpoint::Messages,
            r#"{"system":"s","messages":[],"max_tokens":9,"stop_sequences":["x"],"thinking":{"type":"enabled","budget_tokens":5},"stream":true}"#,
            r#"{"system":"s","messages":[],"thinking":{"type":"enabled","budget_tokens":5},"stream":false,"max_tokens":1}"#,
        );
        check(
            Endpoint::Responses,
            r#"{"input":"a","instructions":"s","max_output_tokens":9,"store":true,"text":{},"request_id":"resp_1"}"#,
            r#"{"input":"a","instructions":"s","stream":false,"store":false,"ignore_eos":true,"max_output_tokens":1}"#,
        );
    }
}
