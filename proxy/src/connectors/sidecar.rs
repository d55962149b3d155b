//! A sidecar at the decode engine. The sender pushes the KV to the sidecar, and the engine finds the KV by
//! the request's id.

use protocol::RequestId;

use crate::connectors::answer::{Answer, NoHandoff, Prefilled};
use crate::connectors::disagg_spec::to_receiver;
use crate::connectors::{Connector, Handoff, Legs, PrefillForm, Spec};

/// Instances with a sidecar.
pub(super) static SPEC: Spec = Spec {
    has_sidecar: true,
    has_ports: true,
    has_zmq: false,
    needs_first_token: false,
    ignores_salt: false,
    splits_all_endpoints: true,
    receives: &[
        (Connector::Sidecar, &Sidecar),
        (Connector::Lmcache, &FromLmcache),
    ],
};

/// Sidecars on both sides.
#[derive(Debug)]
struct Sidecar;

impl Handoff for Sidecar {
    fn prefill_params(&self, legs: &Legs<'_>) -> Option<String> {
        let after = if legs.overlap {
            r#","overlap":true"#
        } else {
            ""
        };
        Some(to_receiver(legs, r#""do_remote_decode":true,"#, after))
    }

    fn decode_params(&self, id: &RequestId, _prefilled: &Prefilled) -> Option<String> {
        Some(from_receiver(id, ""))
    }

    fn can_overlap(&self) -> bool {
        true
    }

    fn sends_early(&self) -> bool {
        true
    }

    fn with_first_token(&self) -> Option<&'static dyn Handoff> {
        Some(&FirstToken)
    }
}

/// Sidecars on both sides; the client gets its first token from the prefill instance.
#[derive(Debug)]
struct FirstToken;

impl Handoff for FirstToken {
    fn prefill_params(&self, legs: &Legs<'_>) -> Option<String> {
        let before = r#""do_remote_decode":true,"ret_first_tok":true,"#;
        Some(to_receiver(legs, before, ""))
    }

    fn decode_params(&self, id: &RequestId, prefilled: &Prefilled) -> Option<String> {
        // The decode leg's prompt ends with the first token. `tokens` is the length of the prompt without
        // the first token.
        let tokens = prefilled
            .prompt_tokens
            .filter(|_| prefilled.first.is_some());
        let more = tokens.map(|tokens| format!(r#","tokens":{tokens}"#));
        Some(from_receiver(id, &more.unwrap_or_default()))
    }

    fn prefill_form(&self) -> PrefillForm {
        PrefillForm::FirstToken
    }

    fn read(&self, answer: &Answer<'_>) -> Result<Prefilled, NoHandoff> {
        let mut prefilled = answer.counts();
        // Without the token or the ids, the client gets its first token from the decode leg as usual.
        let found = answer
            .first_token_id()
            .and_then(|id| answer.first_token(id));
        if let Some((first, Some(tokens))) = found {
            (prefilled.first, prefilled.tokens) = (Some(first), Some(tokens));
        }
        Ok(prefilled)
    }

    fn sends_early(&self) -> bool {
        true
    }
}

/// LMCache at the prefill engine.
#[derive(Debug)]
struct FromLmcache;

impl Handoff for FromLmcache {
    fn prefill_params(&self, legs: &Legs<'_>) -> Option<String> {
        Some(to_receiver(legs, "", ""))
    }

    fn decode_params(&self, id: &RequestId, _prefilled: &Prefilled) -> Option<String> {
        Some(from_receiver(id, r#","written":true"#))
    }

    /// Returns true: LMCache tells only the proxy that the KV is written, and each rank of LMCache sends
    /// its own notice.
    fn needs_notices(&self) -> bool {
        true
    }
}

/// Returns the transfer parameters of a decode leg. `more` are further fields of `disagg_spec`, as JSON.
fn from_receiver(id: &RequestId, more: &str) -> String {
    format!(
        r#"{{"do_remote_prefill":true,"disagg_spec":{{"req_id":"{}"{more}}}}}"#,
        id.0
    )
}
