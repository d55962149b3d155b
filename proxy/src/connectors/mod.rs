//! The hand-over of KV from a prefill to a decode instance. Each connector has its own file and implements one trait.
//! In this table, `file` is the decode instance's connector, and `from` is the prefill instance's connector. The last
//! two columns list what the legs contain for the transfer.
//!
//! | file | from | prefill leg | decode leg |
//! |---|---|---|---|
//! | `sidecar` | sidecar | the receiver's address | the request's id |
//! | `sidecar`, first token | sidecar | the same, and a request for the first token | the request's id, and a prompt that ends with the first token |
//! | `sidecar` | LMCache | the receiver's address | the request's id, and a note that the KV is written |
//! | `lmcache` | LMCache, sidecar | the receiver's address, and a request for the first token | a prompt that ends with the first token |
//! | `nixl` | nixl | a note that a decode leg follows | the parameters from the prefill leg's answer |
//! | `p2p_nccl` | P2P NCCL | the request id, which contains both addresses | the same request id |
//!
//! CONTRIBUTING.md says how to add a connector.

use std::fmt;

use clap::ValueEnum;
use protocol::RequestId;
use serde::{Deserialize, Serialize};

use crate::connectors::answer::{Answer, NoHandoff, Prefilled};

pub(crate) mod answer;
mod disagg_spec;
pub(crate) mod first_token;
mod lmcache;
mod nixl;
mod p2p_nccl;
mod sidecar;

/// The connector by which an instance hands KV over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Connector {
    /// Sidecars: the prefill side's sidecar pushes KV to the decode side's sidecar.
    Sidecar,
    /// vLLM's `NixlConnector`: the prefill answer contains the transfer parameters of the decode leg.
    #[default]
    Nixl,
    /// LMCache inside the engines: `disagg_spec`, `ProxyNotif`, and a hand-over of the first token.
    Lmcache,
    /// vLLM's P2P NCCL connector: the request id names both addresses.
    P2pNccl,
}

impl Connector {
    /// Returns the connector's specification. This is the table of connectors.
    pub(crate) fn spec(self) -> &'static Spec {
        match self {
            Self::Sidecar => &sidecar::SPEC,
            Self::Nixl => &nixl::SPEC,
            Self::Lmcache => &lmcache::SPEC,
            Self::P2pNccl => &p2p_nccl::SPEC,
        }
    }

    /// Returns the hand-off from a prefill instance with the connector `prefill` to a decode instance with
    /// this connector; `None` if instances with these two connectors cannot be a pair.
    pub(crate) fn receives_from(self, prefill: Self) -> Option<&'static dyn Handoff> {
        let found = self
            .spec()
            .receives
            .iter()
            .find(|(from, _)| *from == prefill);
        found.map(|(_, handoff)| *handoff)
    }
}

impl fmt::Display for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.to_possible_value();
        f.write_str(name.as_ref().map_or("", |name| name.get_name()))
    }
}

/// The properties of instances with one connector, and the hand-offs to them.
#[derive(Debug)]
pub(crate) struct Spec {
    /// True if a sidecar registers the instance. An instance with a sidecar has an admin address and cannot
    /// be configured by hand. The sidecar contacts the receiver while its engine computes the prefill leg, so
    /// a second attempt with another prefill instance needs a new id. Our
    /// connector in the engine also moves the KV of several sequences (`n`), of lists of prompts, and of prompts
    /// with images, audio or video.
    pub has_sidecar: bool,
    /// True if senders reach a receiver by its host, its init ports and its alloc ports.
    pub has_ports: bool,
    /// True if request ids contain the instance's ZeroMQ address.
    pub has_zmq: bool,
    /// True if each decode leg with a transfer continues after the prefill instance's first token. If the
    /// first token from the prefill instance would change the answer to a request, the request gets no
    /// transfer to an instance with this connector.
    pub needs_first_token: bool,
    /// True if the connector finds KV by the tokens alone. The KV of a request with a `cache_salt` never goes
    /// to or from an instance with this connector, because requests with other salts would find the KV.
    pub ignores_salt: bool,
    /// True if instances hand KV over for `/v1/messages` and `/v1/responses`, too. It is false if a leg of these
    /// endpoints cannot carry all that the connector needs: a request id of the proxy's choice, or a request for
    /// the first token.
    pub splits_all_endpoints: bool,
    /// For each connector that a prefill instance may have: the hand-off from that instance to a decode
    /// instance with this connector.
    pub receives: &'static [(Connector, &'static dyn Handoff)],
}

/// A protocol by which a prefill instance hands KV over to a decode instance. The default methods suit a
/// prefill engine that needs only its transfer parameters, and a decode leg that waits for the prefill leg's
/// answer.
pub(crate) trait Handoff: fmt::Debug + Sync {
    /// Returns the transfer parameters of the prefill leg, as JSON; `None` if the leg needs none.
    fn prefill_params(&self, legs: &Legs<'_>) -> Option<String>;

    /// Returns the transfer parameters of a decode leg that waits for KV, as JSON; `None` if the decode
    /// engine finds the KV without parameters. `id` is the id that both legs carry.
    fn decode_params(&self, id: &RequestId, prefilled: &Prefilled) -> Option<String>;

    /// Returns the form of the prefill leg.
    fn prefill_form(&self) -> PrefillForm {
        PrefillForm::Discarded
    }

    /// Returns true if the prefill leg fails when its successful answer is not JSON.
    fn needs_answer(&self) -> bool {
        false
    }

    /// Reads the token counts and the other parts of the prefill leg's answer that the decode leg needs.
    ///
    /// # Errors
    /// The reason for which no KV is handed over, although the prompt was computed.
    fn read(&self, answer: &Answer<'_>) -> Result<Prefilled, NoHandoff> {
        Ok(answer.counts())
    }

    /// Returns true if the KV is complete only after a notice from each rank. The prefill leg's answer does
    /// not show that the KV is complete.
    fn needs_notices(&self) -> bool {
        false
    }

    /// Returns true if the decode leg may be sent before the prefill leg's answer has come.
    fn can_overlap(&self) -> bool {
        false
    }

    /// Returns true if the KV is sent while the prefill engine computes. The prefill timeout does not end
    /// such a leg after its engine has begun.
    fn sends_early(&self) -> bool {
        false
    }

    /// Returns the hand-off by which the client gets its first token from the prefill instance; `None` if
    /// there is none.
    fn with_first_token(&self) -> Option<&'static dyn Handoff> {
        None
    }

    /// Returns an id that contains the addresses of both engines. Both legs use this id instead of the
    /// request's id. Returns `None` if the connector reads nothing from ids.
    fn address_id(&self, _prefill: &KvAddress<'_>, _decode: &KvAddress<'_>) -> Option<RequestId> {
        None
    }
}

/// The form of a prefill leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrefillForm {
    /// The client's request, limited to one token. The proxy discards the token.
    Discarded,
    /// The client's request, limited to one token. The client gets the token.
    FirstToken,
    /// A completion of one token for a prompt of token ids. The decode leg's prompt ends with the token.
    TokenIds,
}

/// The properties of a request's legs that the transfer parameters of the prefill leg contain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Legs<'a> {
    /// The id that both legs carry.
    pub id: &'a RequestId,
    /// The address of the decode instance.
    pub decode: KvAddress<'a>,
    /// True if the decode leg is sent before the prefill leg's answer has come.
    pub overlap: bool,
}

/// The address at which other engines and sidecars reach an instance's connector.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct KvAddress<'a> {
    /// Host of the ports.
    pub host: &'a str,
    /// Init port of each rank; empty if the connector has none.
    pub init_ports: &'a [u16],
    /// Alloc port of each rank; empty if the connector has none.
    pub alloc_ports: &'a [u16],
    /// ZeroMQ address (`ip:port`); `None` if the connector has none.
    pub zmq: Option<&'a str>,
}

#[cfg(test)]
mod tests;
