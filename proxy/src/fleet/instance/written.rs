//! An instance as proxies write it into their shared registry.

use protocol::registration::InstanceRole;
use serde::{Deserialize, Serialize};

use super::{Connector, Instance, Source};
use crate::fleet::kv_fit::Kv;

/// An instance as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Its name.
    pub id: String,
    /// The sidecar's epoch.
    pub epoch: u64,
    /// How it hands KV over.
    pub connector: Connector,
    /// Which legs it takes.
    pub role: InstanceRole,
    /// The engine's OpenAI server.
    pub http: String,
    /// The sidecar's admin server.
    pub admin: Option<String>,
    /// P2P NCCL's address.
    pub zmq: Option<String>,
    /// Where senders reach the ports.
    pub host: String,
    /// Init port of each rank.
    pub init_ports: Vec<u16>,
    /// Alloc port of each rank.
    pub alloc_ports: Vec<u16>,
    /// What its sidecar says of its KV.
    #[serde(flatten)]
    pub kv: Kv,
}

impl Written {
    /// What is written of an instance.
    pub fn of(instance: &Instance) -> Self {
        Self {
            id: instance.id.clone(),
            epoch: instance.epoch,
            connector: instance.connector,
            role: instance.role,
            http: instance.http.to_string(),
            admin: instance.admin.as_ref().map(ToString::to_string),
            zmq: instance.zmq.clone(),
            host: instance.host.clone(),
            init_ports: instance.init_ports.clone(),
            alloc_ports: instance.alloc_ports.clone(),
            kv: instance.kv.clone(),
        }
    }

    /// The instance, checked like one that registers.
    ///
    /// # Errors
    /// What cannot be used.
    pub fn instance(self) -> Result<Instance, String> {
        Instance::written(self, Source::Shared).map_err(|e| e.to_string())
    }
}
