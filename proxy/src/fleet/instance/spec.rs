//! Checks the descriptions of instances, which come from registrations, flags, files, `POST /instances`
//! and the shared registry.

use std::net::Ipv6Addr;
use std::sync::Arc;

use clap::ValueEnum;
use protocol::registration::{InstanceRole, Register};
use serde::Deserialize;

use super::{Instance, Source, Standing, Written};
use crate::connectors::Connector;
use crate::fleet::base_url::{BadUrl, BaseUrl, shortened};
use crate::fleet::kv_fit::Kv;
use crate::fleet::models::Models;

/// Role and address of an instance, as flags, files and `POST /instances` give them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// The legs that the instance takes.
    pub role: InstanceRole,
    /// Base URL of the engine's OpenAI server; `host:port` is enough.
    pub url: String,
    /// Id of the instance; `host:port` of `url` if absent.
    #[serde(default)]
    pub id: Option<String>,
    /// The connector by which the instance hands KV over; `nixl` if absent.
    #[serde(default)]
    pub connector: Connector,
    /// LMCache decoders: the host at which prefillers reach the ports; the host of `url` if absent.
    #[serde(default)]
    pub host: Option<String>,
    /// LMCache decoders: init port of each rank.
    #[serde(default)]
    pub init_ports: Vec<u16>,
    /// LMCache decoders: alloc port of each rank.
    #[serde(default)]
    pub alloc_ports: Vec<u16>,
    /// P2P NCCL: `ip:port` of the instance's ZeroMQ socket; required for this connector only.
    #[serde(default)]
    pub zmq: Option<String>,
    /// Names of the models that the instance serves; if empty, the proxy asks the engine for its `/v1/models`.
    #[serde(default)]
    pub models: Vec<String>,
}

/// A description of an instance that the proxy cannot use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// An address that the proxy cannot call.
    #[error(transparent)]
    Url(#[from] BadUrl),
    /// An id that cannot be shown in logs and metrics.
    #[error("id {0:?} is empty, longer than {MAX_ID_BYTES} bytes or not printable ASCII")]
    Id(String),
    /// Lists of ports that do not have one init port and one alloc port per rank.
    #[error(
        "{init} init ports and {alloc} alloc ports: each rank needs one of each; at most {MAX_RANKS} ranks, and a receiver has at least one"
    )]
    Ports {
        /// Number of init ports.
        init: usize,
        /// Number of alloc ports.
        alloc: usize,
    },
    /// A receiver that senders cannot reach.
    #[error("host {0:?} of a receiver is empty or not a host name")]
    Host(String),
    /// A field that the connector requires is missing, or the connector cannot be configured by hand.
    #[error("{0}")]
    Incomplete(String),
}

impl Instance {
    /// Checks a registration and turns it into an instance that is not verified yet.
    ///
    /// # Errors
    /// A field cannot be used. The error names the first such field.
    pub fn parse(register: &Register) -> Result<Self, Unusable> {
        check_id(&register.id)?;
        check_receiver(
            register.role,
            &register.host,
            &register.init_ports,
            &register.alloc_ports,
        )?;
        Ok(Self {
            id: register.id.clone(),
            epoch: register.epoch.0,
            connector: Connector::Sidecar,
            source: Source::Sidecar,
            role: register.role,
            http: BaseUrl::origin("http", &register.http)?,
            admin: Some(BaseUrl::origin("admin", &register.admin)?),
            zmq: None,
            host: register.host.clone(),
            init_ports: register.init_ports.clone(),
            alloc_ports: register.alloc_ports.clone(),
            slots: register.slots,
            free_slots: register.free_slots,
            parked_tokens: register.parked_tokens,
            models: Models::default(),
            kv: Kv::of(register),
            draining: false,
            load: Arc::default(),
            standing: Standing::Unverified,
        })
    }

    /// Checks an instance that comes from flags, a file or `POST /instances`.
    ///
    /// # Errors
    /// A field cannot be used. The error names the first such field.
    pub fn named(named: &Named, source: Source) -> Result<Self, Unusable> {
        let http = BaseUrl::named("url", &named.url)?;
        let id = named
            .id
            .clone()
            .unwrap_or_else(|| http.authority().to_owned());
        check_id(&id)?;
        let host = named.host.clone().unwrap_or_else(|| http.host().to_owned());
        if named.connector.spec().has_sidecar {
            let text = format!(
                "sidecars register themselves: use {} for instances without a sidecar",
                without_sidecar()
            );
            return Err(Unusable::Incomplete(text));
        }
        let ports = (&named.init_ports[..], &named.alloc_ports[..]);
        let zmq = named.zmq.as_deref();
        check_address(named.connector, named.role, &host, ports, zmq)?;
        Ok(Self {
            id,
            epoch: 0,
            connector: named.connector,
            source,
            role: named.role,
            http,
            admin: None,
            zmq: named.zmq.clone(),
            host,
            init_ports: named.init_ports.clone(),
            alloc_ports: named.alloc_ports.clone(),
            slots: 0,
            free_slots: 0,
            parked_tokens: 0,
            models: Models::configured(&named.models),
            kv: Kv::default(),
            draining: false,
            load: Arc::default(),
            standing: Standing::Unverified,
        })
    }

    /// Checks an instance that another proxy has written into the shared registry.
    ///
    /// # Errors
    /// A field cannot be used. The error names the first such field.
    pub fn written(written: Written, source: Source) -> Result<Self, Unusable> {
        check_id(&written.id)?;
        let ports = (&written.init_ports[..], &written.alloc_ports[..]);
        let (connector, zmq) = (written.connector, written.zmq.as_deref());
        check_address(connector, written.role, &written.host, ports, zmq)?;
        let admin = written.admin.as_deref();
        if connector.spec().has_sidecar && admin.is_none() {
            let text = "a sidecar needs an admin address".to_owned();
            return Err(Unusable::Incomplete(text));
        }
        Ok(Self {
            http: BaseUrl::origin("http", &written.http)?,
            admin: admin.map(|url| BaseUrl::origin("admin", url)).transpose()?,
            id: written.id,
            epoch: written.epoch,
            connector: written.connector,
            source,
            role: written.role,
            zmq: written.zmq,
            host: written.host,
            init_ports: written.init_ports,
            alloc_ports: written.alloc_ports,
            slots: 0,
            free_slots: 0,
            parked_tokens: 0,
            models: Models::configured(&written.models),
            kv: written.kv,
            draining: false,
            load: Arc::default(),
            standing: Standing::Unverified,
        })
    }
}

fn check_id(id: &str) -> Result<(), Unusable> {
    let ok = !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(|b| b.is_ascii_graphic());
    if ok && !id.contains('/') {
        return Ok(());
    }
    Err(Unusable::Id(shortened(id)))
}

/// Checks the address at which other engines and sidecars reach an instance: the init and alloc ports, and
/// the ZeroMQ address, as far as the instance's connector needs them.
fn check_address(
    connector: Connector,
    role: InstanceRole,
    host: &str,
    (init, alloc): (&[u16], &[u16]),
    zmq: Option<&str>,
) -> Result<(), Unusable> {
    let spec = connector.spec();
    if spec.has_ports {
        check_receiver(role, host, init, alloc)?;
    }
    if spec.has_zmq && !zmq.is_some_and(is_host_port) {
        let text = format!("{connector} needs zmq: \"ip:port\"");
        return Err(Unusable::Incomplete(text));
    }
    Ok(())
}

/// Returns the names of the connectors whose instances can be configured by hand.
fn without_sidecar() -> String {
    let all = Connector::value_variants().iter();
    let names: Vec<_> = all
        .filter(|connector| !connector.spec().has_sidecar)
        .map(ToString::to_string)
        .collect();
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

fn check_receiver(
    role: InstanceRole,
    host: &str,
    init: &[u16],
    alloc: &[u16],
) -> Result<(), Unusable> {
    let receives = role != InstanceRole::Prefill;
    let (init, alloc) = (init.len(), alloc.len());
    if init != alloc || init > MAX_RANKS || (receives && init == 0) {
        return Err(Unusable::Ports { init, alloc });
    }
    let host_ok = host.len() <= MAX_HOST_BYTES && host.bytes().all(|b| b.is_ascii_graphic());
    if !host_ok || (receives && host.is_empty()) {
        return Err(Unusable::Host(shortened(host)));
    }
    Ok(())
}

/// Returns true for `host:port` in the form that P2P NCCL's request ids contain. Any other character could
/// end an address early inside a request id, so that an engine would connect to a wrong host.
fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let letters = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-');
    let bracketed = host.strip_prefix('[').and_then(|at| at.strip_suffix(']'));
    let is_host = match bracketed {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(letters),
    };
    is_host && host.len() <= MAX_HOST_BYTES && port.parse::<u16>().is_ok_and(|port| port != 0)
}

/// The longest id in bytes: ids appear in metric labels and in log lines.
const MAX_ID_BYTES: usize = 128;
/// The longest host name in bytes, as in DNS.
const MAX_HOST_BYTES: usize = 253;
/// Maximum number of ranks of an instance: the largest tensor-parallel size in use is 16.
const MAX_RANKS: usize = 64;
