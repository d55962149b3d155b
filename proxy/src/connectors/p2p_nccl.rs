//! vLLM's P2P NCCL connector: both engines read each other's address from the request id.

use protocol::RequestId;

use crate::connectors::answer::Prefilled;
use crate::connectors::{Connector, Handoff, KvAddress, Legs, Spec};
use crate::openai::request_id::random;

/// Instances with vLLM's P2P NCCL connector.
pub(super) static SPEC: Spec = Spec {
    has_sidecar: false,
    has_ports: false,
    has_zmq: true,
    needs_first_token: false,
    ignores_salt: false,
    splits_all_endpoints: false,
    receives: &[(Connector::P2pNccl, &P2pNccl)],
};

#[derive(Debug)]
struct P2pNccl;

impl Handoff for P2pNccl {
    fn prefill_params(&self, _legs: &Legs<'_>) -> Option<String> {
        None
    }

    fn decode_params(&self, _id: &RequestId, _prefilled: &Prefilled) -> Option<String> {
        None
    }

    /// Returns the id by which P2P NCCL instances find each other. The id ends with 32 random hex digits,
    /// and not with the client's id, because the client's id may contain characters that end an address.
    fn address_id(&self, prefill: &KvAddress<'_>, decode: &KvAddress<'_>) -> Option<RequestId> {
        let (from, to) = (prefill.zmq?, decode.zmq?);
        Some(RequestId(format!(
            "___prefill_addr_{from}___decode_addr_{to}_{}",
            random().simple()
        )))
    }
}
