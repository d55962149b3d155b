//! A request's JSON body: an ordered list of fields whose values stay as they came, byte for byte.
//!
//! Only the fields that decide a route are read. A prompt of 100,000 token ids is neither parsed
//! nor printed again, and numbers, order and unknown fields reach the engine as the client wrote
//! them.

use std::fmt;

use bytes::Bytes;
use protocol::RequestId;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::error::{ApiError, Code};
use crate::instance::Instance;
use crate::route::Alone;

/// Which of OpenAI's endpoints a request uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

/// A body that is one JSON object.
#[derive(Clone, Debug)]
pub struct RequestBody {
    fields: Vec<(String, Box<RawValue>)>,
}

/// A body that cannot be routed.
#[derive(Debug, thiserror::Error)]
pub enum BadBody {
    /// Not a JSON object.
    #[error("the request body is not a JSON object: {0}")]
    Json(#[from] serde_json::Error),
    /// The client names a transfer of its own.
    #[error(
        "kv_transfer_params is set by this proxy and must not be sent by a client: it names hosts that engines connect to"
    )]
    TransferParams,
}

impl Endpoint {
    /// The path at this proxy and at the engines.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
        }
    }
}

impl RequestBody {
    /// Reads a body.
    ///
    /// # Errors
    /// Not a JSON object, or one that carries transfer parameters.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadBody> {
        let mut body: Self = serde_json::from_slice(bytes)?;
        if body.is_set("kv_transfer_params") {
            return Err(BadBody::TransferParams);
        }
        body.remove("kv_transfer_params");
        Ok(body)
    }

    /// Why this request gets no transfer; `None` if one prompt becomes one sequence.
    pub fn alone(&self, endpoint: Endpoint) -> Option<Alone> {
        let more_than_one = |name| self.text(name).is_some_and(|text| text != "1");
        if more_than_one("n") || more_than_one("best_of") || self.is_on("use_beam_search") {
            return Some(Alone::ManySequences);
        }
        if self.is_set("prompt_logprobs") || (self.is_on("echo") && self.is_set("logprobs")) {
            return Some(Alone::PromptLogprobs);
        }
        if self.is_set("prompt_embeds") {
            return Some(Alone::PromptEmbeds);
        }
        if self.is_set("cache_salt") {
            return Some(Alone::CacheSalt);
        }
        if ["max_tokens", "max_completion_tokens"]
            .into_iter()
            .any(|name| self.text(name) == Some("0"))
        {
            return Some(Alone::NothingToDecode);
        }
        match endpoint {
            Endpoint::Completions if self.has_many_prompts() => Some(Alone::ManyPrompts),
            Endpoint::Chat if self.has_media() => Some(Alone::Multimodal),
            _ => None,
        }
    }

    /// The body of the prefill leg: one token, not streamed, pushed to `decode`.
    pub fn prefill_leg(&self, endpoint: Endpoint, id: &RequestId, decode: &Instance) -> Bytes {
        let mut leg = self.clone();
        for name in NOT_FOR_PREFILL {
            leg.remove(name);
        }
        leg.set("stream", &false);
        if endpoint == Endpoint::Chat && self.is_set("max_completion_tokens") {
            leg.set("max_completion_tokens", &1);
        }
        leg.set("max_tokens", &1);
        leg.set(
            "kv_transfer_params",
            &serde_json::json!({
                "do_remote_decode": true,
                "disagg_spec": {
                    "req_id": id,
                    "receiver_host": decode.host,
                    "receiver_init_port": decode.init_ports,
                    "receiver_alloc_port": decode.alloc_ports,
                    "overlap": true,
                },
            }),
        );
        leg.to_bytes()
    }

    /// The body of a decode leg that waits for its KV.
    pub fn decode_leg(&self, id: &RequestId) -> Bytes {
        let mut leg = self.clone();
        leg.set(
            "kv_transfer_params",
            &serde_json::json!({"do_remote_prefill": true, "disagg_spec": {"req_id": id}}),
        );
        leg.to_bytes()
    }

    /// The body of a decode leg that computes everything itself: the client's, unchanged.
    pub fn local_leg(&self) -> Bytes {
        self.to_bytes()
    }

    /// The value of the last field of this name, as engines read repeated names; `None` for null.
    fn text(&self, name: &str) -> Option<&str> {
        let (_, value) = self.fields.iter().rev().find(|(field, _)| field == name)?;
        Some(value.get()).filter(|text| *text != "null")
    }

    fn is_set(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    fn is_on(&self, name: &str) -> bool {
        self.text(name)
            .is_some_and(|text| !matches!(text, "false" | "0"))
    }

    fn has_many_prompts(&self) -> bool {
        let Some(list) = self.text("prompt").and_then(|text| text.strip_prefix('[')) else {
            return false;
        };
        // One list of token ids is one prompt; a list of strings or lists is as many as it is long.
        if list
            .trim_start()
            .starts_with(|c: char| c == '-' || c.is_ascii_digit())
        {
            return false;
        }
        self.read::<Vec<&RawValue>>("prompt")
            .is_some_and(|prompts| prompts.len() > 1)
    }

    fn has_media(&self) -> bool {
        let messages: Vec<Message<'_>> = self.read("messages").unwrap_or_default();
        messages
            .iter()
            .filter_map(|message| message.content)
            .filter_map(|content| serde_json::from_str::<Vec<Part>>(content.get()).ok())
            .flatten()
            .any(|part| part.kind.is_some_and(|kind| !TEXT_PARTS.contains(&&*kind)))
    }

    /// A value in the shape that is expected of it. The engine, not the proxy, refuses others.
    fn read<'a, T: Deserialize<'a>>(&'a self, name: &str) -> Option<T> {
        serde_json::from_str(self.text(name)?).ok()
    }

    fn set<T: Serialize>(&mut self, name: &str, value: &T) {
        self.remove(name);
        // Numbers, booleans and maps with string keys always serialise.
        let value = serde_json::value::to_raw_value(value).expect("plain values serialise");
        self.fields.push((name.to_owned(), value));
    }

    fn remove(&mut self, name: &str) {
        self.fields.retain(|(field, _)| field != name);
    }

    fn to_bytes(&self) -> Bytes {
        // Strings and verbatim JSON always serialise.
        serde_json::to_vec(self)
            .expect("verbatim JSON serialises")
            .into()
    }
}

impl From<BadBody> for ApiError {
    fn from(error: BadBody) -> Self {
        let code = match error {
            BadBody::Json(_) => Code::InvalidJson,
            BadBody::TransferParams => Code::TransferParams,
        };
        Self::new(code, error.to_string())
    }
}

impl<'de> Deserialize<'de> for RequestBody {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = RequestBody;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RequestBody, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    if fields.len() == MAX_FIELDS {
                        return Err(A::Error::custom(format_args!(
                            "more than {MAX_FIELDS} fields"
                        )));
                    }
                    fields.push(field);
                }
                Ok(RequestBody { fields })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl Serialize for RequestBody {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.fields.iter().map(|(name, value)| (name, value)))
    }
}

/// As much of a chat message as tells whether it is only text.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

/// As much of a content part.
#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type", default)]
    kind: Option<String>,
}

/// The prefill leg yields one token that nobody reads: what only shapes the answer is left out, and
/// what contradicts one token would be refused.
const NOT_FOR_PREFILL: [&str; 7] = [
    "stream_options",
    "min_tokens",
    "n",
    "best_of",
    "logprobs",
    "top_logprobs",
    "echo",
];

/// Content parts that end up as text in the prompt.
const TEXT_PARTS: [&str; 6] = [
    "text",
    "input_text",
    "output_text",
    "refusal",
    "thinking",
    "reasoning",
];

/// OpenAI and vLLM together define about 80.
const MAX_FIELDS: usize = 1024;

#[cfg(test)]
mod tests;
