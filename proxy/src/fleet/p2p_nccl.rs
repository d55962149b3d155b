//! The registration message of vLLM's P2P NCCL instances.

use std::time::Duration;

use protocol::registration::InstanceRole;
use serde::Deserialize;

use crate::connectors::Connector;
use crate::fleet::instance::{Instance, Named, Source, Unusable};

/// The message by which an instance registers. The instance repeats the message every three seconds.
#[derive(Debug, Deserialize)]
struct Hello {
    #[serde(rename = "type")]
    kind: String,
    http_address: String,
    zmq_address: String,
}

/// A message that the proxy refuses.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadHello {
    /// The bytes are not a registration message.
    #[error("malformed: {0}")]
    Malformed(String),
    /// The message names an address that the proxy cannot use.
    #[error(transparent)]
    Unusable(#[from] Unusable),
}

/// Reads a registration message and returns its instance.
///
/// # Errors
/// The message names no instance that can be used.
pub(crate) fn hello(bytes: &[u8]) -> Result<Instance, BadHello> {
    if bytes.len() > MAX_BYTES {
        return Err(BadHello::Malformed(format!("{} bytes", bytes.len())));
    }
    let hello: Hello =
        rmp_serde::from_slice(bytes).map_err(|e| BadHello::Malformed(e.to_string()))?;
    let role = match hello.kind.as_str() {
        "P" => InstanceRole::Prefill,
        "D" => InstanceRole::Decode,
        _ => return Err(BadHello::Malformed("its type is neither P nor D".into())),
    };
    let named = Named {
        role,
        url: format!("http://{}", hello.http_address),
        id: None,
        connector: Connector::P2pNccl,
        host: None,
        init_ports: Vec::new(),
        alloc_ports: Vec::new(),
        zmq: Some(hello.zmq_address),
        models: Vec::new(),
    };
    Ok(Instance::named(&named, Source::P2pNccl)?)
}

/// Lease of an instance. The lease expires after three missed messages.
pub(crate) const LEASE: Duration = Duration::from_secs(10);

/// The longest message in bytes: it contains three short strings.
const MAX_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hellos() {
        let read = |kind: &str, http: &str, zmq: &str| {
            let map = std::collections::BTreeMap::from([
                ("type", kind),
                ("http_address", http),
                ("zmq_address", zmq),
            ]);
            hello(&rmp_serde::to_vec_named(&map).unwrap())
        };
        let p = read("P", "10.0.0.1:20001", "10.0.0.1:21001").unwrap();
        assert_eq!(
            (p.id.as_str(), p.role),
            ("10.0.0.1:20001", InstanceRole::Prefill)
        );
        assert_eq!(p.zmq.as_deref(), Some("10.0.0.1:21001"));
        let d = read("D", "10.0.0.2:20001", "10.0.0.2:21001").unwrap();
        assert_eq!(
            (d.role, d.connector),
            (InstanceRole::Decode, Connector::P2pNccl)
        );
        assert!(read("X", "10.0.0.1:1", "10.0.0.1:2").is_err());
        assert!(read("P", "", "10.0.0.1:2").is_err());
        assert!(read("P", "u@h:1", "10.0.0.1:2").is_err());
        assert!(read("P", "10.0.0.1:1", "10.0.0.1").is_err());
        assert!(read("P", "10.0.0.1:1", "1.1.1.1:2___decode_addr_2.2.2.2:3").is_err());
        assert!(hello(b"\x81\xa4type\xa1P").is_err());
        assert!(hello(&[0xc1; 10]).is_err());
        assert!(hello(&[0x80; 5000]).is_err());
    }
}
