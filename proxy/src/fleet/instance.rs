//! An instance as the proxy knows it: one vLLM, and its sidecar if it has a sidecar.

use std::sync::Arc;

use protocol::registration::InstanceRole;
use serde::Serialize;

use crate::connectors::{Connector, KvAddress};
use crate::fleet::base_url::BaseUrl;
use crate::fleet::kv_fit::Kv;
use crate::fleet::load::Load;
use crate::fleet::models::Models;

pub(crate) mod spec;
mod written;

pub(crate) use spec::{Named, Unusable};
pub(crate) use written::Written;

/// One instance, as routing, `/instances` and the legs read it.
#[derive(Clone, Debug, Serialize)]
pub struct Instance {
    /// The sidecar's id or, without a sidecar, the configured id; by default `host:port`.
    pub id: String,
    /// The sidecar's epoch; 0 without a sidecar.
    pub epoch: u64,
    /// The connector by which the instance hands KV over.
    pub connector: Connector,
    /// The source from which the proxy knows the instance.
    pub source: Source,
    /// The legs that the instance takes: prefill, decode or both.
    pub role: InstanceRole,
    /// The engine's OpenAI server.
    pub http: BaseUrl,
    /// The sidecar's admin server; `None` without a sidecar.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<BaseUrl>,
    /// P2P NCCL: the ZeroMQ address (`ip:port`) that request ids contain; `None` for other connectors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zmq: Option<String>,
    /// Host at which senders reach `init_ports` and `alloc_ports`.
    pub host: String,
    /// Init port of each rank; empty if the instance has none.
    pub init_ports: Vec<u16>,
    /// Alloc port of each rank; empty if the instance has none.
    pub alloc_ports: Vec<u16>,
    /// Number of slots in the receive buffer; 0 if not known.
    pub slots: u32,
    /// Number of free slots at the last heartbeat.
    pub free_slots: u32,
    /// Number of tokens of the decode requests that were parked at the instance at the last heartbeat.
    pub parked_tokens: u64,
    /// Names of the models that the instance serves; empty if not known.
    pub models: Models,
    /// The KV description that the sidecar gave; the default without a sidecar.
    #[serde(flatten)]
    pub kv: Kv,
    /// True if an operator drains the instance: it takes no new requests.
    pub draining: bool,
    /// Requests in flight and failures, counted by this proxy.
    #[serde(skip)]
    pub load: Arc<Load>,
    /// Readiness according to the last answer to a call-back.
    pub standing: Standing,
}

/// The source from which the proxy knows an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A sidecar, on the registration port.
    Sidecar,
    /// A flag, a file or the environment.
    Configured,
    /// `POST /instances`.
    Added,
    /// The instance itself, on the port for P2P NCCL instances.
    P2pNccl,
    /// The registry that several proxies share.
    Shared,
}

/// Readiness of an instance. Only a ready instance gets requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", content = "reason", rename_all = "snake_case")]
pub enum Standing {
    /// The instance has registered, but no call-back has confirmed it yet.
    Unverified,
    /// The last answer to a call-back said that the instance is ready.
    Ready,
    /// The instance is not ready, for this reason.
    NotReady(String),
}

impl Instance {
    /// Returns true if the instance gets requests: it is ready and not draining.
    pub fn is_ready(&self) -> bool {
        self.standing == Standing::Ready && !self.draining
    }

    /// Returns true if the instance takes prefill legs.
    pub fn prefills(&self) -> bool {
        self.role != InstanceRole::Decode
    }

    /// Returns true if the instance takes decode legs.
    pub fn decodes(&self) -> bool {
        self.role != InstanceRole::Prefill
    }

    /// Returns the address at which other engines and sidecars reach the instance's connector.
    pub(crate) fn kv_address(&self) -> KvAddress<'_> {
        KvAddress {
            host: &self.host,
            init_ports: &self.init_ports,
            alloc_ports: &self.alloc_ports,
            zmq: self.zmq.as_deref(),
        }
    }

    /// Returns the hosts to which the proxy or a sender connects for this instance.
    pub fn hosts(&self) -> impl Iterator<Item = &str> {
        let admin = self.admin.as_ref().map(|admin| admin.host());
        let receiver = Some(self.host.as_str()).filter(|host| !host.is_empty());
        [Some(self.http.host()), admin, receiver]
            .into_iter()
            .flatten()
    }

    /// Returns true if both instances have the same role, connector and addresses. Role, connector and
    /// addresses must not change within an epoch.
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
