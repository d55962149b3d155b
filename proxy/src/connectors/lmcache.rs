//! LMCache inside the decode engine: the engine finds the KV by the hashes of its chunks.
//!
//! An LMCache decoder looks up all tokens except the last token. The decoder's chunk hashes must equal the
//! prefiller's chunk hashes, so the decode leg's prompt ends with the token that the prefill instance has
//! sampled.

use protocol::RequestId;

use crate::connectors::answer::{Answer, NoHandoff, Prefilled};
use crate::connectors::disagg_spec::to_receiver;
use crate::connectors::{Connector, Handoff, Legs, PrefillForm, Spec};

/// Instances with LMCache.
pub(super) static SPEC: Spec = Spec {
    has_sidecar: false,
    has_ports: true,
    has_zmq: false,
    needs_first_token: true,
    ignores_salt: true,
    splits_all_endpoints: false,
    receives: &[
        (Connector::Lmcache, &ToLmcache),
        (Connector::Sidecar, &ToLmcache),
    ],
};

#[derive(Debug)]
struct ToLmcache;

impl Handoff for ToLmcache {
    fn prefill_params(&self, legs: &Legs<'_>) -> Option<String> {
        Some(to_receiver(legs, r#""ret_first_tok":true,"#, ""))
    }

    fn decode_params(&self, _id: &RequestId, _prefilled: &Prefilled) -> Option<String> {
        None
    }

    fn prefill_form(&self) -> PrefillForm {
        PrefillForm::TokenIds
    }

    fn needs_answer(&self) -> bool {
        true
    }

    fn read(&self, answer: &Answer<'_>) -> Result<Prefilled, NoHandoff> {
        let Some(id) = answer.first_token_id() else {
            return Err(NoHandoff::not_pushed("its answer carries no first_tok"));
        };
        // The decode leg's prompt ends with the first token, so the client can get this token's text only
        // from the prefill leg's answer.
        let Some((first, _)) = answer.first_token(id) else {
            return Err(NoHandoff::not_expressible(
                "its first token cannot be shown by itself",
            ));
        };
        Ok(Prefilled {
            first: Some(first),
            ..answer.counts()
        })
    }

    /// Returns true: each rank of the prefill instance sends a notice when it has written its part.
    fn needs_notices(&self) -> bool {
        true
    }
}
