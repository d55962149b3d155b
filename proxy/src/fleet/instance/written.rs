//! An instance as proxies write it into their shared registry.

use protocol::registration::InstanceRole;
use serde::{Deserialize, Serialize};

use super::{Instance, Source};
use crate::connectors::Connector;
use crate::fleet::kv_fit::Kv;

/// The description of an instance in the shared registry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Id of the instance.
    pub id: String,
    /// The sidecar's epoch; 0 without a sidecar.
    pub epoch: u64,
    /// The connector by which the instance hands KV over.
    pub connector: Connector,
    /// The legs that the instance takes.
    pub role: InstanceRole,
    /// Base URL of the engine's OpenAI server.
    pub http: String,
    /// Base URL of the sidecar's admin server; `None` without a sidecar.
    pub admin: Option<String>,
    /// P2P NCCL: `ip:port` of the ZeroMQ socket; `None` for other connectors.
    pub zmq: Option<String>,
    /// Host at which senders reach the ports.
    pub host: String,
    /// Init port of each rank; empty if the instance has none.
    pub init_ports: Vec<u16>,
    /// Alloc port of each rank; empty if the instance has none.
    pub alloc_ports: Vec<u16>,
    /// Names of the models that the configuration gives; empty if each proxy asks the engine.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
    /// The KV description that the sidecar gave.
    #[serde(flatten)]
    pub kv: Kv,
}

impl Written {
    /// Returns the description of `instance` for the shared registry.
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
            models: match instance.models.is_configured() {
                true => instance.models.names().map(str::to_owned).collect(),
                false => Vec::new(),
            },
            kv: instance.kv.clone(),
        }
    }

    /// Checks the description in the same way as a registration, and returns the instance.
    ///
    /// # Errors
    /// A field cannot be used. The error names the first such field.
    pub fn instance(self) -> Result<Instance, String> {
        Instance::written(self, Source::Shared).map_err(|e| e.to_string())
    }
}
