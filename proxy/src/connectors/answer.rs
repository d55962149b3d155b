//! The answer of a prefill leg: token counts, transfer parameters, and the first token.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::connectors::Handoff;
use crate::openai::fallback::Fallback;
use crate::openai::usage::Usage;

/// The result of a prefill leg.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prefilled {
    /// Length of the prompt in tokens; `None` if the engine does not give it.
    pub prompt_tokens: Option<u64>,
    /// Number of prompt tokens that were cached at the prefill instance; `None` if the engine does not
    /// give it.
    pub cached_tokens: Option<u64>,
    /// Number of prompt tokens that the prefill instance has put into its cache; `None` if the engine does
    /// not give it.
    pub written_tokens: Option<u64>,
    /// Transfer parameters for the decode leg, as JSON; `None` if the answer has no parameters for the
    /// decode leg.
    pub params: Option<String>,
    /// Token ids of the prompt, as JSON; `None` if the decode leg does not need them.
    pub tokens: Option<String>,
    /// The token that the prefill instance has sampled; `None` if the decode leg samples its own first
    /// token.
    pub first: Option<FirstToken>,
}

/// The first token of an answer, sampled by the prefill instance.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct FirstToken {
    /// Token id.
    pub id: i64,
    /// Text of the token.
    pub text: String,
    /// The reason for which the answer ends with this token; `length` means only that the leg asked for
    /// one token. `None` if the engine gives no reason.
    pub finish_reason: Option<String>,
}

/// The reason for which no KV is handed over, although the prompt was computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NoHandoff {
    /// The reason in metrics and records.
    pub fallback: Fallback,
    /// The reason in the log; for a refused push, the sender's own reason.
    pub text: String,
}

impl NoHandoff {
    /// Creates the reason for a prefill instance that does not hand the KV over.
    pub(crate) fn not_pushed(text: &str) -> Self {
        Self {
            fallback: Fallback::NotPushed,
            text: text.to_owned(),
        }
    }

    /// Creates the reason for a request that the first-token hand-over cannot express.
    pub(crate) fn not_expressible(text: &str) -> Self {
        Self {
            fallback: Fallback::NotExpressible,
            text: text.to_owned(),
        }
    }
}

/// A successful answer of a prefill leg.
#[derive(Debug)]
pub(crate) struct Answer<'a> {
    body: &'a [u8],
    usage: Option<Usage>,
    /// The transfer parameters, as JSON; `None` if the answer has none.
    raw: Option<&'a str>,
    /// The transfer parameters that the proxy reads; `None` if they have another shape.
    params: Option<Params>,
}

/// The fields of a prefill leg's answer on which the decode leg depends.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow, default)]
    kv_transfer_params: Option<&'a RawValue>,
    #[serde(default)]
    usage: Option<Usage>,
}

/// The transfer parameters that the proxy reads.
#[derive(Debug, Deserialize)]
struct Params {
    pushed: Option<bool>,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    do_remote_prefill: bool,
    first_tok: Option<i64>,
    /// Number of cached tokens of the prompt. vLLM adds this number for the decode leg.
    remote_prefill_cached_tokens: Option<u64>,
}

/// The part of an answer that describes its first token.
#[derive(Deserialize)]
struct Completion<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    /// Token ids of the prompt in a chat; in a completion, the choice contains them.
    #[serde(borrow, default)]
    prompt_token_ids: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    message: Option<Message>,
    #[serde(default)]
    finish_reason: Option<String>,
    #[serde(borrow, default)]
    prompt_token_ids: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    content: Option<String>,
    #[serde(default, alias = "reasoning_content")]
    reasoning: Option<String>,
}

/// Reads the successful answer of a prefill leg.
///
/// # Errors
/// The reason for which no KV is handed over, although the prompt was computed.
pub(crate) fn read(handoff: &dyn Handoff, body: &[u8]) -> Result<Prefilled, NoHandoff> {
    let Some(answer) = Answer::parse(body) else {
        // The status already shows that the prompt is computed. Only some hand-offs also need the answer's
        // content.
        return match handoff.needs_answer() {
            true => Err(NoHandoff::not_pushed("its answer is not JSON")),
            false => Ok(Prefilled::default()),
        };
    };
    // A refused push is an error for every hand-off, so the check for a refused push comes before the
    // hand-off reads the answer.
    if let Some(params) = &answer.params
        && params.pushed == Some(false)
    {
        return Err(NoHandoff::not_pushed(&params.reason));
    }
    handoff.read(&answer)
}

impl<'a> Answer<'a> {
    /// Parses an answer; `None` if it is not JSON.
    fn parse(body: &'a [u8]) -> Option<Self> {
        let fields: Fields<'a> = serde_json::from_slice(body).ok()?;
        let raw = fields.kv_transfer_params.map(RawValue::get);
        Some(Self {
            body,
            usage: fields.usage,
            raw,
            params: raw.and_then(|raw| serde_json::from_str(raw).ok()),
        })
    }

    /// Returns a result that holds the answer's token counts.
    pub(super) fn counts(&self) -> Prefilled {
        let details = self.usage.and_then(|usage| usage.prompt_tokens_details);
        // `usage` has the number of cached tokens only if the engine gives details; vLLM also adds the
        // number to the transfer parameters.
        let params = self.params.as_ref();
        let added = params.and_then(|params| params.remote_prefill_cached_tokens);
        Prefilled {
            prompt_tokens: self.usage.map(|usage| usage.prompt_tokens),
            cached_tokens: details.and_then(|details| details.cached_tokens).or(added),
            written_tokens: details.and_then(|details| details.written_tokens),
            ..Prefilled::default()
        }
    }

    /// Returns the transfer parameters as JSON; `None` if a decode engine cannot use them to read the KV.
    pub(super) fn remote_prefill(&self) -> Option<&'a str> {
        self.raw
            .filter(|_| (self.params.as_ref()).is_some_and(|params| params.do_remote_prefill))
    }

    /// Returns the id of the first token; `None` if the answer does not give it.
    pub(super) fn first_token_id(&self) -> Option<i64> {
        self.params.as_ref()?.first_tok
    }

    /// Returns the first token of the answer, and the token ids of its prompt if the answer has them. `id`
    /// is the token's id. Returns `None` if the token's text depends on the tokens after it: the text is
    /// half a character, or a reasoning parser changes it.
    pub(super) fn first_token(&self, id: i64) -> Option<(FirstToken, Option<String>)> {
        let answer: Completion<'_> = serde_json::from_slice(self.body).ok()?;
        let choice = answer.choices.into_iter().next()?;
        let text = match (choice.text, choice.message) {
            (Some(text), _) => text,
            (None, Some(message)) if message.reasoning.is_none() => {
                message.content.unwrap_or_default()
            }
            (None, _) => return None,
        };
        let is_last = choice.finish_reason.as_deref() != Some("length");
        if text.contains(char::REPLACEMENT_CHARACTER) || (text.is_empty() && !is_last) {
            return None;
        }
        let first = FirstToken {
            id,
            text,
            finish_reason: choice.finish_reason,
        };
        let tokens = answer.prompt_token_ids.or(choice.prompt_token_ids);
        let tokens = tokens.map(|tokens| tokens.get().to_owned());
        Some((first, tokens.filter(|tokens| tokens.starts_with('['))))
    }
}
