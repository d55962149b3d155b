//! vLLM's `NixlConnector`: the decode engine reads the KV from the prefill engine. The prefill leg's
//! answer contains the parameters for the read.

use protocol::RequestId;

use crate::connectors::answer::{Answer, NoHandoff, Prefilled};
use crate::connectors::{Connector, Handoff, Legs, Spec};

/// Instances with vLLM's `NixlConnector`.
pub(super) static SPEC: Spec = Spec {
    has_sidecar: false,
    has_ports: false,
    has_zmq: false,
    needs_first_token: false,
    ignores_salt: false,
    splits_all_endpoints: true,
    receives: &[(Connector::Nixl, &Nixl)],
};

#[derive(Debug)]
struct Nixl;

impl Handoff for Nixl {
    fn prefill_params(&self, _legs: &Legs<'_>) -> Option<String> {
        Some(PREFILL.to_owned())
    }

    fn decode_params(&self, _id: &RequestId, prefilled: &Prefilled) -> Option<String> {
        prefilled.params.clone()
    }

    fn needs_answer(&self) -> bool {
        true
    }

    fn read(&self, answer: &Answer<'_>) -> Result<Prefilled, NoHandoff> {
        // The parameters are passed on byte for byte: the decode engine reads fields that the proxy does
        // not know.
        let Some(params) = answer.remote_prefill() else {
            return Err(NoHandoff::not_pushed(
                "its answer carries no kv_transfer_params to read the KV by",
            ));
        };
        Ok(Prefilled {
            params: Some(params.to_owned()),
            ..answer.counts()
        })
    }
}

/// The parameters that vLLM's own examples send.
const PREFILL: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;
