//! An instance: one vLLM and its sidecar, as the proxy knows it.

use std::sync::Arc;

use clap::ValueEnum;
use protocol::registration::InstanceRole;
use serde::{Deserialize, Serialize};

use crate::fleet::base_url::BaseUrl;
use crate::fleet::kv_fit::Kv;
use crate::fleet::load::Load;

pub(crate) mod spec;
mod written;

pub(crate) use spec::{Named, Unusable};
pub(crate) use written::Written;

/// One instance. What routing, `/instances` and the legs read.
#[derive(Clone, Debug, Serialize)]
pub struct Instance {
    /// Its name: the sidecar's, or its address.
    pub id: String,
    /// The sidecar's epoch; 0 where there is none.
    pub epoch: u64,
    /// How it hands KV over.
    pub connector: Connector,
    /// Who has named it.
    pub source: Source,
    /// Which legs it takes.
    pub role: InstanceRole,
    /// The engine's OpenAI server.
    pub http: BaseUrl,
    /// The sidecar's admin server, if there is a sidecar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<BaseUrl>,
    /// P2P NCCL: the address that its request ids carry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zmq: Option<String>,
    /// Host at which senders reach the ports below.
    pub host: String,
    /// Init port of each rank.
    pub init_ports: Vec<u16>,
    /// Alloc port of each rank.
    pub alloc_ports: Vec<u16>,
    /// Slots of its buffer.
    pub slots: u32,
    /// Of them free, by its last word.
    pub free_slots: u32,
    /// Tokens of decode requests that are parked there, by its last word.
    pub parked_tokens: u64,
    /// What its sidecar says of its KV.
    #[serde(flatten)]
    pub kv: Kv,
    /// It takes no new requests, on somebody's order.
    pub draining: bool,
    /// What it is busy with.
    #[serde(skip)]
    pub load: Arc<Load>,
    /// Whether it gets requests.
    pub standing: Standing,
}

/// How an instance hands KV over. Both instances of a pair have the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Connector {
    /// Through sidecars, which push.
    Sidecar,
    /// vLLM's `NixlConnector`: the prefill answer says what the decode leg has to carry.
    #[default]
    Nixl,
    /// LMCache inside the engines: `disagg_spec`, `ProxyNotif`, the first token handed over.
    Lmcache,
    /// vLLM's P2P NCCL connector: the request id names both addresses.
    P2pNccl,
}

/// Who has named an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A sidecar, on the registration port.
    Sidecar,
    /// A flag, a file or the environment.
    Configured,
    /// `POST /instances`.
    Added,
    /// Itself, on the port of P2P NCCL instances.
    P2pNccl,
    /// The registry that several proxies share.
    Shared,
}

/// Whether an instance gets requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", content = "reason", rename_all = "snake_case")]
pub enum Standing {
    /// It has registered, but its admin address has not confirmed id and epoch yet.
    Unverified,
    /// Called back and ready.
    Ready,
    /// Called back, but not ready, for this reason.
    NotReady(String),
}

impl Instance {
    /// It gets requests.
    pub fn is_ready(&self) -> bool {
        self.standing == Standing::Ready && !self.draining
    }

    /// It takes prefill legs.
    pub fn prefills(&self) -> bool {
        self.role != InstanceRole::Decode
    }

    /// It takes decode legs.
    pub fn decodes(&self) -> bool {
        self.role != InstanceRole::Prefill
    }

    /// `other` names the same addresses: what may not change within an epoch.
    pub fn same_place(&self, other: &Self) -> bool {
        self.role == other.role
            && self.http == other.http
            && self.admin == other.admin
            && self.connector == other.connector
            && self.zmq == other.zmq
            && self.host == other.host
            && self.init_ports == other.init_ports
            && self.alloc_ports == other.alloc_ports
    }
}
