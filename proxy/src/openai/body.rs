//! A request's JSON body: an ordered list of fields. The proxy forwards each value byte for byte.
//!
//! The proxy reads only the fields that decide a route. The proxy does not parse the prompt, which may have
//! 100,000 token ids. Numbers, the order of fields and unknown fields reach the engine as the client wrote
//! them.

use std::ops::Range;

use bytes::Bytes;
use memchr::memmem;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::openai::endpoint::Endpoint;
use crate::openai::error::{ApiError, Code};
use crate::openai::fallback::Fallback;

mod fields;
mod kinds;
mod newer;
mod shape;
mod text;

use fields::Fields;
pub(crate) use kinds::{Kind, kind};

/// A body that is one JSON object.
#[derive(Clone, Debug)]
pub(crate) struct RequestBody {
    /// The body as received, converted to UTF-8.
    source: Bytes,
    /// The same text with plain numbers instead of `NaN` and `Infinity`, so that serde can read it. The
    /// ranges in `fields` are valid for both texts.
    read: Bytes,
    fields: Vec<Field>,
    /// True if `source` can be forwarded unchanged, because no field was dropped.
    is_clean: bool,
}

/// One known field of the body, or a run of neighbouring unknown fields.
#[derive(Clone, Debug)]
struct Field {
    /// Name of the field; empty for a run of unknown fields.
    name: &'static str,
    /// Range of name and value, or of the whole run.
    all: Range<usize>,
    value: Range<usize>,
}

/// The part of a prefill leg's answer that reaches the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrefillAnswer {
    /// The client gets the leg's token as the first token of its answer. The engine samples this token
    /// with the client's settings.
    FirstToken,
    /// The client gets nothing. The leg only computes KV.
    Nothing,
}

/// A body that cannot be routed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadBody {
    /// Not a JSON object.
    #[error("the request body is not a JSON object: {0}")]
    Json(#[from] serde_json::Error),
    /// The body is not valid in the encoding that its first bytes announce.
    #[error(
        "the request body is not a JSON object: its first bytes announce UTF-16 or UTF-32, but the rest is not valid"
    )]
    Encoding,
    /// The client sends transfer parameters of its own.
    #[error(
        "a client must not send kv_transfer_params: only this proxy sets it, because it names hosts to which engines connect"
    )]
    TransferParams,
}

impl RequestBody {
    /// Reads a body.
    ///
    /// # Errors
    /// The body is not a JSON object, or it carries transfer parameters.
    pub(crate) fn parse(source: Bytes) -> Result<Self, BadBody> {
        let source = text::utf8(source).ok_or(BadBody::Encoding)?;
        match Self::found(source.clone(), source.clone()) {
            Err(BadBody::Json(error)) => match text::masked(&source) {
                Some(masked) => Self::found(source, masked.into()),
                None => Err(error.into()),
            },
            found => found,
        }
    }

    /// Returns a body that the proxy does not read, because only the engine knows its form.
    pub(crate) fn opaque(source: Bytes) -> Self {
        Self {
            read: source.clone(),
            source,
            fields: Vec::new(),
            is_clean: true,
        }
    }

    /// Finds the fields of a body. `read` is the body's text, in which the fields are found.
    fn found(source: Bytes, read: Bytes) -> Result<Self, BadBody> {
        let Fields(found) = serde_json::from_slice(&read)?;
        let start = read.as_ptr() as usize;
        let mut from = 0;
        let fields = found
            .into_iter()
            .map(|run| {
                let value = run.last.get();
                let at = value.as_ptr() as usize - start;
                let value = at..at + value.len();
                // Blanks, one brace or comma, and more blanks come before a name.
                let is_blank =
                    |byte: &u8| byte.is_ascii_whitespace() || matches!(byte, b'{' | b',');
                let blank = read[from..]
                    .iter()
                    .take_while(|byte| is_blank(byte))
                    .count();
                let all = from + blank..value.end;
                from = value.end;
                Field {
                    name: run.name,
                    all,
                    value,
                }
            })
            .collect();
        let mut body = Self {
            source,
            read: read.clone(),
            fields,
            is_clean: true,
        };
        if body.is_set(TRANSFER) {
            return Err(BadBody::TransferParams);
        }
        let before = body.fields.len();
        body.fields.retain(|field| field.name != TRANSFER);
        body.is_clean = body.fields.len() == before;
        Ok(body)
    }

    /// Returns the reason for which no two instances can transfer KV for this request; `None` if no reason
    /// is known.
    pub(crate) fn fallback(&self, endpoint: Endpoint) -> Option<Fallback> {
        if let Endpoint::Passed(_) = endpoint {
            return Some(Fallback::PassedOn);
        }
        if self.is_not_one("best_of") || self.is_on("use_beam_search") {
            return Some(Fallback::ManySequences);
        }
        // A chat with `echo` gets log probabilities of its prompt even without the field, because vLLM's default of
        // `top_logprobs` is 0 and not null.
        let echoes = self.is_on("echo") && (endpoint == Endpoint::Chat || self.is_set("logprobs"));
        if self.is_set("prompt_logprobs") || echoes {
            return Some(Fallback::PromptLogprobs);
        }
        if self.is_set("prompt_embeds") {
            return Some(Fallback::PromptEmbeds);
        }
        if ["max_tokens", "max_completion_tokens"]
            .into_iter()
            .any(|name| self.number(name) == Some(0.0))
        {
            return Some(Fallback::NothingToDecode);
        }
        match endpoint {
            Endpoint::Chat if self.has_named_media() => Some(Fallback::Multimodal),
            Endpoint::Messages if self.has_blocks_of_media("messages") => {
                Some(Fallback::Multimodal)
            }
            Endpoint::Responses => self.fallback_of_response(),
            _ => None,
        }
    }

    /// Returns the reason for which only instances with sidecars can transfer KV for this request; `None` if
    /// there is no such reason.
    pub(crate) fn sidecars_only(&self, endpoint: Endpoint) -> Option<Fallback> {
        if endpoint == Endpoint::Completions && self.has_many_prompts() {
            return Some(Fallback::ManyPrompts);
        }
        if endpoint == Endpoint::Chat && self.has_media() {
            return Some(Fallback::Multimodal);
        }
        self.is_not_one("n").then_some(Fallback::ManySequences)
    }

    /// Returns true if the request has a cache salt. The request must not use KV of equal tokens with
    /// another salt.
    pub(crate) fn is_salted(&self) -> bool {
        self.is_set("cache_salt")
    }

    /// Returns the body of a prefill leg: one token, not streamed, with these transfer parameters.
    pub(crate) fn prefill_leg(
        &self,
        endpoint: Endpoint,
        params: Option<&str>,
        answer: PrefillAnswer,
    ) -> Bytes {
        // The client gets the leg's token only with `FirstToken`. Without `FirstToken` the proxy drops the
        // token, so the leg needs no sampling fields.
        let is_answer = answer == PrefillAnswer::FirstToken;
        let keep = |name: &str| match kind(name) {
            Some(Kind::Sampling) => is_answer,
            // Some chat templates render `response_format` into the prompt.
            Some(Kind::Answer) => endpoint == Endpoint::Chat && name == "response_format",
            Some(Kind::Frame) => false,
            Some(Kind::Tokenized | Kind::Prompt | Kind::Asker) | None => true,
        };
        let mut set = vec![("stream", "false")];
        if endpoint == Endpoint::Responses {
            // The client gets, and later names, only the response of the decode instance.
            set.push(("store", "false"));
        }
        if is_answer {
            set.push(("return_token_ids", "true"));
            set.extend(self.first_of_min_tokens());
        } else if endpoint != Endpoint::Messages {
            // Some connectors hand KV over only if the length limit ended the answer. Without
            // `ignore_eos`, an end-of-sequence token could end the answer instead.
            set.push(("ignore_eos", "true"));
        }
        if endpoint == Endpoint::Chat && self.is_set("max_completion_tokens") {
            set.push(("max_completion_tokens", "1"));
        }
        set.push(match endpoint {
            Endpoint::Responses => ("max_output_tokens", "1"),
            _ => ("max_tokens", "1"),
        });
        set.extend(params.map(|params| (TRANSFER, params)));
        self.with(keep, &set)
    }

    /// Returns the field `min_tokens` of a leg that generates only the answer's first token; `None` if the
    /// client asks for no minimum.
    pub(crate) fn first_of_min_tokens(&self) -> Option<(&'static str, &'static str)> {
        let least = self.number("min_tokens").unwrap_or_default();
        (least >= 1.0).then_some(("min_tokens", "1"))
    }

    /// Returns the body of a decode leg with these transfer parameters.
    pub(crate) fn decode_leg(&self, params: &str) -> Bytes {
        self.with(|_| true, &[(TRANSFER, params)])
    }

    /// Returns the body of a decode leg without a transfer: the client's body, unchanged.
    pub(crate) fn local_leg(&self) -> Bytes {
        if self.is_clean {
            return self.source.clone();
        }
        self.with(|_| true, &[])
    }

    /// Returns the body with the fields that the filter `keep` accepts, and with the fields in the list
    /// `set`, whose values are JSON.
    pub(crate) fn with(&self, keep: impl Fn(&str) -> bool, set: &[(&str, &str)]) -> Bytes {
        let added: usize = set
            .iter()
            .map(|(name, value)| name.len() + value.len() + 4)
            .sum();
        let mut out = Vec::with_capacity(self.source.len() + added + 2);
        out.push(b'{');
        let is_kept = |name| keep(name) && set.iter().all(|(other, _)| *other != name);
        for field in self.fields.iter().filter(|field| is_kept(field.name)) {
            if out.len() > 1 {
                out.push(b',');
            }
            out.extend_from_slice(&self.source[field.all.clone()]);
        }
        for (name, value) in set {
            let comma = if out.len() > 1 { "," } else { "" };
            out.extend_from_slice(format!("{comma}\"{name}\":{value}").as_bytes());
        }
        out.push(b'}');
        out.into()
    }

    /// Returns the body with only these fields.
    pub(crate) fn only(&self, names: &[&str]) -> Bytes {
        self.with(|name| names.contains(&name), &[])
    }

    /// Returns the body as the client wrote it, in UTF-8 unless the proxy does not read it.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.source
    }

    /// Returns the length of the body in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.source.len() as u64
    }

    /// Returns true if the client wants a stream of events.
    pub(crate) fn streams(&self) -> bool {
        self.is_on("stream")
    }

    /// Returns the value of a field as JSON; `None` if the field is absent or null.
    pub(crate) fn json(&self, name: &str) -> Option<&str> {
        self.text(name)
    }

    /// Returns the value of the last field of this name, because engines also use the last of repeated
    /// fields; `None` if the field is absent or null.
    fn text(&self, name: &str) -> Option<&str> {
        let field = self.fields.iter().rev().find(|field| field.name == name)?;
        // The conversion cannot fail: serde has read the value as JSON text.
        let text = std::str::from_utf8(&self.read[field.value.clone()]).ok()?;
        Some(text).filter(|text| *text != "null")
    }

    /// Returns the number in a field; `None` if the value is not a number. Engines accept numbers in
    /// quotes, so this function does, too.
    pub(crate) fn number(&self, name: &str) -> Option<f64> {
        let text = self.text(name)?;
        let quoted = text
            .strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'));
        quoted.unwrap_or(text).trim().parse().ok()
    }

    /// Returns true if the body has fields that this proxy does not know.
    pub(crate) fn has_unknown(&self) -> bool {
        self.fields.iter().any(|field| field.name.is_empty())
    }

    /// Returns the maximum number of tokens that the client wants; `None` if the client gives no maximum.
    pub(crate) fn max_tokens(&self, endpoint: Endpoint) -> Option<u64> {
        let read = |name| self.json(name)?.parse().ok();
        match endpoint {
            Endpoint::Chat => read("max_completion_tokens").or_else(|| read("max_tokens")),
            Endpoint::Responses => read("max_output_tokens"),
            Endpoint::Completions | Endpoint::Messages | Endpoint::Passed(_) => read("max_tokens"),
        }
    }

    /// Returns the names of the fields, with an empty name for each run of unknown fields.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'static str> {
        self.fields.iter().map(|field| field.name)
    }

    fn is_set(&self, name: &str) -> bool {
        self.text(name).is_some()
    }

    fn is_on(&self, name: &str) -> bool {
        self.text(name)
            .is_some_and(|text| !FALSE.contains(&&*text.trim_matches('"').to_ascii_lowercase()))
    }

    fn is_not_one(&self, name: &str) -> bool {
        self.is_set(name) && self.number(name) != Some(1.0)
    }

    fn has_many_prompts(&self) -> bool {
        let Some(list) = self.text("prompt").and_then(|text| text.strip_prefix('[')) else {
            return false;
        };
        // A list of token ids is one prompt. A list of strings or of lists has one prompt per entry.
        if list
            .trim_start()
            .starts_with(|c: char| c == '-' || c.is_ascii_digit())
        {
            return false;
        }
        self.read::<Vec<&RawValue>>("prompt")
            .is_some_and(|prompts| prompts.len() > 1)
    }

    /// Returns true if an image, audio or video may have a name of the client's (`uuid`). The engine that has
    /// it in its cache needs only the name. The other engine would refuse the request.
    fn has_named_media(&self) -> bool {
        // Inside a JSON string, these quotes would be escaped.
        let names = |text: &str| memmem::find(text.as_bytes(), b"\"uuid\"").is_some();
        self.text("messages").is_some_and(names) && self.has_media()
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

    /// Returns the value of a field; `None` if the value does not have the expected shape. The engine, and
    /// not the proxy, refuses a request with a malformed value.
    fn read<'a, T: Deserialize<'a>>(&'a self, name: &str) -> Option<T> {
        serde_json::from_str(self.text(name)?).ok()
    }
}

impl From<BadBody> for ApiError {
    fn from(error: BadBody) -> Self {
        let code = match error {
            BadBody::Json(_) | BadBody::Encoding => Code::InvalidJson,
            BadBody::TransferParams => Code::TransferParams,
        };
        Self::new(code, error.to_string())
    }
}

/// The part of a chat message that shows whether the message is only text.
#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

/// The field of a content part that gives the part's kind.
#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type", default)]
    kind: Option<String>,
}

/// Kinds of content parts that become text in the prompt.
const TEXT_PARTS: [&str; 6] = [
    "text",
    "input_text",
    "output_text",
    "refusal",
    "thinking",
    "reasoning",
];

/// Values that engines read as false, with or without quotes.
const FALSE: [&str; 7] = ["false", "0", "0.0", "no", "n", "off", "f"];

/// The field that carries the parameters of a KV transfer.
const TRANSFER: &str = "kv_transfer_params";

#[cfg(test)]
mod tests;
