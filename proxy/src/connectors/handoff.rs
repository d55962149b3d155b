//! The transfer parameters of both legs of a request, by which KV gets from one instance to the other.
//!
//! | way | prefill leg | decode leg |
//! |---|---|---|
//! | sidecar | where the receiver is | the request's id |
//! | first-token | the same; token ids and the first token are wanted | token ids, with the first token, and the id |
//! | from-lmcache | where the receiver is | the request's id, and that all is written |
//! | lmcache | where the receiver is; the first token is wanted | token ids, with the first token |
//! | nixl | that a decode instance follows | what the prefill answer says |
//! | p2p-nccl | nothing: both addresses stand in the request id | nothing |

use std::fmt::Write;

use protocol::RequestId;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::fleet::instance::{Connector, Instance};
use crate::openai::body::PrefillAnswer;
use crate::openai::fallback::Fallback;
use crate::openai::request_id::random;
use crate::openai::usage::Usage;

/// The way in which a pair hands KV over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HandoffMode {
    /// Sidecars on both sides.
    Sidecar,
    /// Sidecars on both sides; the client gets its first token from the prefill instance.
    FirstToken,
    /// From LMCache to a sidecar.
    FromLmcache,
    /// From LMCache or a sidecar to LMCache.
    Lmcache,
    /// vLLM's `NixlConnector` on both sides.
    Nixl,
    /// vLLM's P2P NCCL connector on both sides.
    P2pNccl,
}

/// The result of a prefill leg.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Prefilled {
    /// Length of the prompt in tokens; `None` if the engine does not give it.
    pub prompt_tokens: Option<u64>,
    /// Number of those tokens that were cached at the prefill instance; `None` if the engine does not
    /// give it.
    pub cached_tokens: Option<u64>,
    /// NIXL: the transfer parameters for the decode leg, as JSON; `None` for other modes.
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

/// The part of a prefill leg's answer that decides about the decode leg.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow, default)]
    kv_transfer_params: Option<&'a RawValue>,
    #[serde(default)]
    usage: Option<Usage>,
}

/// The part of the transfer parameters that decides.
#[derive(Deserialize)]
struct Params {
    pushed: Option<bool>,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    do_remote_prefill: bool,
    first_tok: Option<i64>,
    /// vLLM adds this number for the decode leg.
    remote_prefill_cached_tokens: Option<u64>,
}

/// The part of an answer that describes its first token.
#[derive(Deserialize)]
struct Completion<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    /// Token ids of the prompt in a chat; a completion has them in its choice.
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

impl HandoffMode {
    /// Returns the mode of a pair; `None` if these two instances cannot be a pair.
    pub(crate) fn of(prefill: &Instance, decode: &Instance) -> Option<Self> {
        use Connector as C;
        match (prefill.connector, decode.connector) {
            (C::Sidecar, C::Sidecar) => Some(Self::Sidecar),
            (C::Lmcache, C::Sidecar) => Some(Self::FromLmcache),
            (C::Lmcache | C::Sidecar, C::Lmcache) => Some(Self::Lmcache),
            (C::Nixl, C::Nixl) => Some(Self::Nixl),
            (C::P2pNccl, C::P2pNccl) => Some(Self::P2pNccl),
            _ => None,
        }
    }

    /// Returns the part of the prefill leg's answer that reaches the client.
    pub(crate) fn prefill_answer(self) -> PrefillAnswer {
        match self {
            Self::FirstToken => PrefillAnswer::FirstToken,
            _ => PrefillAnswer::Nothing,
        }
    }
}

/// Returns the transfer parameters of a prefill leg, as JSON; `None` if the mode needs none. With
/// `overlap`, the decode leg does not wait for the prefill leg's answer.
pub(crate) fn prefill_params(
    id: &RequestId,
    way: HandoffMode,
    decode: &Instance,
    overlap: bool,
) -> Option<String> {
    let (before, after) = match (way, overlap) {
        (HandoffMode::Sidecar, true) => (r#""do_remote_decode":true,"#, r#","overlap":true"#),
        (HandoffMode::Sidecar, false) => (r#""do_remote_decode":true,"#, ""),
        (HandoffMode::FirstToken, _) => (r#""do_remote_decode":true,"ret_first_tok":true,"#, ""),
        (HandoffMode::FromLmcache, _) => ("", ""),
        (HandoffMode::Lmcache, _) => (r#""ret_first_tok":true,"#, ""),
        (HandoffMode::Nixl, _) => return Some(NIXL_PREFILL.to_owned()),
        (HandoffMode::P2pNccl, _) => return None,
    };
    Some(receiver(id, decode, before, after))
}

/// Returns the transfer parameters of a decode leg to a sidecar's engine, as JSON.
pub(crate) fn decode_params(
    id: &RequestId,
    way: HandoffMode,
    prompt_tokens: Option<u64>,
) -> String {
    let more = match (way, prompt_tokens) {
        (HandoffMode::FromLmcache, _) => r#","written":true"#.to_owned(),
        (HandoffMode::FirstToken, Some(tokens)) => format!(r#","tokens":{tokens}"#),
        _ => String::new(),
    };
    format!(
        r#"{{"do_remote_prefill":true,"disagg_spec":{{"req_id":"{}"{more}}}}}"#,
        id.0
    )
}

/// Returns the id that both legs of a request carry.
///
/// P2P NCCL instances find each other by this id. It ends in 32 random hex digits instead of the
/// client's id, which may hold characters that end an address.
pub(crate) fn leg_id(id: &RequestId, prefill: &Instance, decode: &Instance) -> RequestId {
    match (&prefill.zmq, &decode.zmq) {
        (Some(from), Some(to)) if decode.connector == Connector::P2pNccl => RequestId(format!(
            "___prefill_addr_{from}___decode_addr_{to}_{}",
            random().simple()
        )),
        _ => id.clone(),
    }
}

/// Reads the answer of a prefill leg.
///
/// # Errors
/// The reason for which no KV is handed over, although the prompt was computed.
pub(crate) fn prefilled(way: HandoffMode, body: &[u8]) -> Result<Prefilled, (Fallback, String)> {
    let not_pushed = |why: &str| Err((Fallback::NotPushed, why.to_owned()));
    let Ok(answer) = serde_json::from_slice::<Answer<'_>>(body) else {
        // The status already says that the prompt is computed. Only some modes need more than that.
        return match way {
            HandoffMode::Nixl | HandoffMode::Lmcache => not_pushed("its answer is not JSON"),
            _ => Ok(Prefilled::default()),
        };
    };
    let mut prefilled = Prefilled {
        prompt_tokens: answer.usage.map(|usage| usage.prompt_tokens),
        ..Prefilled::default()
    };
    let raw = answer.kv_transfer_params.map(RawValue::get);
    let params = raw.and_then(|raw| serde_json::from_str::<Params>(raw).ok());
    // A push that was refused fails in every mode, so this comes before the mode is read.
    if let Some(params) = &params
        && params.pushed == Some(false)
    {
        return not_pushed(&params.reason);
    }
    let first = params.as_ref().and_then(|params| params.first_tok);
    let details = answer.usage.and_then(|usage| usage.prompt_tokens_details);
    // `usage` has the number only if the engine gives details; vLLM also adds it to the transfer
    // parameters.
    let added = params
        .as_ref()
        .and_then(|params| params.remote_prefill_cached_tokens);
    prefilled.cached_tokens = details.and_then(|details| details.cached_tokens).or(added);
    match way {
        HandoffMode::Sidecar | HandoffMode::FromLmcache | HandoffMode::P2pNccl => {}
        // The parameters pass byte for byte: the decode engine reads fields that the proxy does not
        // know.
        HandoffMode::Nixl if params.is_some_and(|params| params.do_remote_prefill) => {
            prefilled.params = raw.map(str::to_owned);
        }
        HandoffMode::Nixl => {
            return not_pushed("its answer carries no kv_transfer_params to read the KV by");
        }
        HandoffMode::Lmcache => {
            let Some(id) = first else {
                return not_pushed("its answer carries no first_tok");
            };
            // The decode leg's prompt ends with this token, so its text has to come from this answer.
            let Some((first, _)) = first_token(id, body) else {
                let why = "its first token cannot be shown by itself";
                return Err((Fallback::NotExpressible, why.to_owned()));
            };
            prefilled.first = Some(first);
        }
        HandoffMode::FirstToken => {
            // Without the token or the ids, the client gets its first token from the decode leg as
            // usual.
            let found = first.and_then(|id| first_token(id, body));
            if let Some((first, Some(tokens))) = found {
                (prefilled.first, prefilled.tokens) = (Some(first), Some(tokens));
            }
        }
    }
    Ok(prefilled)
}

/// Returns the first token of an answer, and the token ids of its prompt if the answer has them. Returns
/// `None` if the token's text cannot be shown before the rest is known: half a character, or a text that
/// a reasoning parser changes.
fn first_token(id: i64, body: &[u8]) -> Option<(FirstToken, Option<String>)> {
    let answer: Completion<'_> = serde_json::from_slice(body).ok()?;
    let choice = answer.choices.into_iter().next()?;
    let text = match (choice.text, choice.message) {
        (Some(text), _) => text,
        (None, Some(message)) if message.reasoning.is_none() => message.content.unwrap_or_default(),
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

fn receiver(id: &RequestId, decode: &Instance, before: &str, after: &str) -> String {
    // Request ids are letters, digits, '-', '_' and '.', which need no escaping. Hosts may be anything
    // printable, so they are escaped.
    let host = serde_json::Value::from(decode.host.as_str());
    let mut text = format!(
        r#"{{{before}"disagg_spec":{{"req_id":"{}","receiver_host":{host},"receiver_init_port":"#,
        id.0
    );
    // Writing into a string cannot fail.
    let _ = write!(
        text,
        r#"{:?},"receiver_alloc_port":{:?}{after}}}}}"#,
        decode.init_ports, decode.alloc_ports
    );
    text
}

/// The parameters that vLLM's own examples send.
const NIXL_PREFILL: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

#[cfg(test)]
mod tests;
