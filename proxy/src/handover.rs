//! What the two legs of a request say to each connector, so that KV gets from one to the other.
//!
//! | connector | prefill leg | decode leg |
//! |---|---|---|
//! | sidecar | where the receiver is | the request's id |
//! | nixl | that a decode instance follows | what the prefill answer says |
//! | lmcache | where the receiver is; the first token is wanted | token ids, with the first token |
//! | p2p-nccl | nothing: both addresses stand in the request id | nothing |

use std::fmt::Write;

use protocol::RequestId;
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::instance::{Connector, Instance};
use crate::usage::Usage;

/// What a prefill leg has brought.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prefilled {
    /// The prompt's length, if the engine says it.
    pub prompt_tokens: Option<u64>,
    /// NIXL: what the decode leg has to carry, as JSON.
    pub params: Option<String>,
    /// LMCache: the prompt's token ids, as JSON.
    pub tokens: Option<String>,
    /// LMCache: the token that the prefill instance has sampled.
    pub first: Option<FirstToken>,
}

/// The first token of an answer, sampled by the prefill instance.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FirstToken {
    /// Its id.
    pub id: i64,
    /// Its text.
    pub text: String,
    /// Why the answer ends with it; `length` means only that no more was asked for.
    pub finish_reason: Option<String>,
}

/// What decides over the decode leg in a prefill leg's answer.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(borrow, default)]
    kv_transfer_params: Option<&'a RawValue>,
    #[serde(default)]
    usage: Option<Usage>,
}

/// As much of the parameters as decides.
#[derive(Deserialize)]
struct Params {
    pushed: Option<bool>,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    do_remote_prefill: bool,
    first_tok: Option<i64>,
}

/// As much of a completion as LMCache's hand-over needs.
#[derive(Deserialize)]
struct Completion {
    #[serde(default)]
    choices: Vec<Choice>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
    #[serde(default)]
    finish_reason: Option<String>,
}

/// The transfer parameters of a prefill leg, as JSON.
pub fn prefill_params(id: &RequestId, decode: &Instance) -> Option<String> {
    match decode.connector {
        Connector::Sidecar => Some(receiver(
            id,
            decode,
            r#""do_remote_decode":true,"#,
            ",\"overlap\":true",
        )),
        Connector::Lmcache => Some(receiver(id, decode, r#""ret_first_tok":true,"#, "")),
        Connector::Nixl => Some(NIXL_PREFILL.to_owned()),
        Connector::P2pNccl => None,
    }
}

/// The transfer parameters of a sidecar's decode leg, as JSON.
pub fn sidecar_decode_params(id: &RequestId) -> String {
    format!(
        r#"{{"do_remote_prefill":true,"disagg_spec":{{"req_id":"{}"}}}}"#,
        id.0
    )
}

/// The id that both legs of a request carry.
///
/// P2P NCCL instances find each other by it. It ends in 32 hex digits of its own, because the
/// client's id may hold anything that ends an address.
pub fn leg_id(id: &RequestId, prefill: &Instance, decode: &Instance) -> RequestId {
    match (&prefill.zmq, &decode.zmq) {
        (Some(from), Some(to)) if decode.connector == Connector::P2pNccl => RequestId(format!(
            "___prefill_addr_{from}___decode_addr_{to}_{}",
            Uuid::new_v4().simple()
        )),
        _ => id.clone(),
    }
}

/// Reads a prefill leg's answer.
///
/// # Errors
/// Why nothing is handed over, although the prompt was computed.
pub fn prefilled(connector: Connector, body: &[u8]) -> Result<Prefilled, String> {
    let Ok(answer) = serde_json::from_slice::<Answer<'_>>(body) else {
        // The head says that the prompt is computed; only some connectors need more than that.
        return match connector {
            Connector::Sidecar | Connector::P2pNccl => Ok(Prefilled::default()),
            Connector::Nixl | Connector::Lmcache => Err("its answer is not JSON".into()),
        };
    };
    let mut prefilled = Prefilled {
        prompt_tokens: answer.usage.map(|usage| usage.prompt_tokens),
        ..Prefilled::default()
    };
    let raw = answer.kv_transfer_params.map(RawValue::get);
    let params = raw.and_then(|raw| serde_json::from_str::<Params>(raw).ok());
    match (connector, params) {
        (_, Some(params)) if params.pushed == Some(false) => return Err(params.reason),
        (Connector::Sidecar | Connector::P2pNccl, _) => {}
        (Connector::Nixl, Some(params)) if params.do_remote_prefill => {
            prefilled.params = raw.map(str::to_owned);
        }
        (Connector::Nixl, _) => {
            return Err("its answer carries no kv_transfer_params to read the KV by".into());
        }
        (Connector::Lmcache, params) => {
            let Some(id) = params.and_then(|params| params.first_tok) else {
                return Err("its answer carries no first_tok".into());
            };
            let choice = serde_json::from_slice::<Completion>(body)
                .ok()
                .and_then(|completion| completion.choices.into_iter().next())
                .ok_or("its answer has no choice")?;
            prefilled.first = Some(FirstToken {
                id,
                text: choice.text,
                finish_reason: choice.finish_reason,
            });
        }
    }
    Ok(prefilled)
}

fn receiver(id: &RequestId, decode: &Instance, before: &str, after: &str) -> String {
    // Request ids are plain letters, digits, '-', '_' and '.'; hosts may be anything printable.
    let host = serde_json::Value::from(decode.host.as_str());
    let mut text = format!(
        r#"{{{before}"disagg_spec":{{"req_id":"{}","receiver_host":{host},"receiver_init_port":"#,
        id.0
    );
    // Writing into a string does not fail.
    let _ = write!(
        text,
        r#"{:?},"receiver_alloc_port":{:?}{after}}}}}"#,
        decode.init_ports, decode.alloc_ports
    );
    text
}

/// As vLLM's own examples send it.
const NIXL_PREFILL: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

#[cfg(test)]
mod tests;
