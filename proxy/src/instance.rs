//! An instance: one vLLM and its sidecar, as the proxy knows it.

use std::fmt;
use std::sync::Arc;

use clap::ValueEnum;
use http::Uri;
use http::uri::Authority;
use protocol::registration::{InstanceRole, Register};
use serde::{Deserialize, Serialize, Serializer};

use crate::load::Load;
use crate::shared::Written;

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

/// Which legs an instance takes and where it is, as flags, files and `POST /instances` say it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Which legs it takes.
    pub role: InstanceRole,
    /// Base URL of its OpenAI server.
    pub url: String,
    /// Its name; its address if absent.
    #[serde(default)]
    pub id: Option<String>,
    /// How it hands KV over.
    #[serde(default)]
    pub connector: Connector,
    /// LMCache decoders: the host that prefillers reach; that of `url` if absent.
    #[serde(default)]
    pub host: Option<String>,
    /// LMCache decoders: init port of each rank.
    #[serde(default)]
    pub init_ports: Vec<u16>,
    /// LMCache decoders: alloc port of each rank.
    #[serde(default)]
    pub alloc_ports: Vec<u16>,
    /// P2P NCCL: `ip:port` of its ZeroMQ socket.
    #[serde(default)]
    pub zmq: Option<String>,
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

/// Base URL of an HTTP server: scheme, authority and perhaps a path prefix, without a final slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl(String);

/// A registration that names something unusable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// An URL that the proxy cannot call.
    #[error("{field} {value:?} is not an http:// or https:// URL with a host and, if any, a port")]
    Url {
        /// `http` or `admin`.
        field: &'static str,
        /// What was registered.
        value: String,
    },
    /// An id that cannot be shown in logs and metrics.
    #[error("id {0:?} is empty, longer than {MAX_ID_BYTES} bytes or not printable ASCII")]
    Id(String),
    /// Port lists that do not fit together.
    #[error(
        "{init} init ports and {alloc} alloc ports: one of each per rank is needed, {MAX_RANKS} at most, and for a receiver at least one"
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
    /// A connector that needs what is not given.
    #[error("{0}")]
    Incomplete(&'static str),
}

impl Instance {
    /// Checks a registration and turns it into an instance that is not verified yet.
    ///
    /// # Errors
    /// The first field that cannot be used.
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
            http: BaseUrl::parse("http", &register.http)?,
            admin: Some(BaseUrl::parse("admin", &register.admin)?),
            zmq: None,
            host: register.host.clone(),
            init_ports: register.init_ports.clone(),
            alloc_ports: register.alloc_ports.clone(),
            slots: register.slots,
            free_slots: register.free_slots,
            parked_tokens: register.parked_tokens,
            draining: false,
            load: Arc::default(),
            standing: Standing::Unverified,
        })
    }

    /// Checks an instance that somebody has named.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn named(named: &Named, source: Source) -> Result<Self, Unusable> {
        let http = BaseUrl::named("url", &named.url)?;
        let id = named
            .id
            .clone()
            .unwrap_or_else(|| http.authority().to_owned());
        check_id(&id)?;
        let host = named.host.clone().unwrap_or_else(|| http.host().to_owned());
        match named.connector {
            Connector::Sidecar => {
                return Err(Unusable::Incomplete(
                    "sidecars register themselves; name nixl, lmcache or p2p-nccl",
                ));
            }
            Connector::Lmcache => {
                check_receiver(named.role, &host, &named.init_ports, &named.alloc_ports)?;
            }
            Connector::P2pNccl if named.zmq.as_deref().is_none_or(|at| !is_host_port(at)) => {
                return Err(Unusable::Incomplete("p2p-nccl needs zmq: \"ip:port\""));
            }
            Connector::P2pNccl | Connector::Nixl => {}
        }
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
            draining: false,
            load: Arc::default(),
            standing: Standing::Unverified,
        })
    }

    /// Checks an instance that another proxy has written.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn written(written: Written, source: Source) -> Result<Self, Unusable> {
        check_id(&written.id)?;
        let (host, init, alloc) = (&written.host, &written.init_ports, &written.alloc_ports);
        match written.connector {
            Connector::Sidecar | Connector::Lmcache => {
                check_receiver(written.role, host, init, alloc)?;
            }
            Connector::Nixl => {}
            Connector::P2pNccl if written.zmq.as_deref().is_some_and(is_host_port) => {}
            Connector::P2pNccl => return Err(Unusable::Incomplete("p2p-nccl without zmq")),
        }
        let admin = written.admin.as_deref();
        if written.connector == Connector::Sidecar && admin.is_none() {
            return Err(Unusable::Incomplete("a sidecar without an admin address"));
        }
        Ok(Self {
            http: BaseUrl::parse("http", &written.http)?,
            admin: admin.map(|url| BaseUrl::parse("admin", url)).transpose()?,
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
            draining: false,
            load: Arc::default(),
            standing: Standing::Unverified,
        })
    }

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

impl BaseUrl {
    /// Checks an URL.
    ///
    /// # Errors
    /// Not `http://`, no host, a port that is none, user information, a query, or too long.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, Unusable> {
        let refused = || Unusable::Url {
            field,
            value: shortened(text),
        };
        if text.len() > MAX_URL_BYTES {
            return Err(refused());
        }
        let uri: Uri = text.parse().map_err(|_| refused())?;
        let authority = uri.authority().ok_or_else(refused)?;
        if !matches!(uri.scheme_str(), Some("http" | "https"))
            || authority.host().is_empty()
            || authority.as_str().contains('@')
            || !has_port_if_any(authority)
            || uri.query().is_some()
        {
            return Err(refused());
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }

    /// Checks an URL that somebody has written: as in the demos' environment files, host and port alone
    /// will do.
    ///
    /// # Errors
    /// As of [`BaseUrl::parse`]; and a host alone.
    pub fn named(field: &'static str, text: &str) -> Result<Self, Unusable> {
        let text = text.trim();
        if text.contains("://") {
            return Self::parse(field, text);
        }
        let url = Self::parse(field, &format!("http://{text}"))?;
        if url.authority().len() > url.host().len() {
            return Ok(url);
        }
        Err(Unusable::Url {
            field,
            value: shortened(text),
        })
    }

    /// Host and port as they stand in it.
    pub fn authority(&self) -> &str {
        let (_, rest) = self.0.split_once("://").unwrap_or_default();
        rest.split('/').next().unwrap_or_default()
    }

    /// The host, an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        let authority = self.authority();
        match authority
            .strip_prefix('[')
            .and_then(|at| at.split_once(']'))
        {
            Some((host, _)) => host,
            None => authority.split(':').next().unwrap_or_default(),
        }
    }

    /// It is reached over TLS.
    pub fn is_tls(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// The URL of `path`, which begins with a slash.
    pub fn join(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for BaseUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

fn has_port_if_any(authority: &Authority) -> bool {
    let is_given = authority.as_str().len() > authority.host().len();
    !is_given || authority.port_u16().is_some_and(|port| port != 0)
}

fn check_id(id: &str) -> Result<(), Unusable> {
    let ok = !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(|b| b.is_ascii_graphic());
    if ok && !id.contains('/') {
        return Ok(());
    }
    Err(Unusable::Id(shortened(id)))
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

/// As it stands in the request ids of P2P NCCL: anything else could end one address early.
pub fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let letters = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-');
    !host.is_empty()
        && host.len() <= MAX_HOST_BYTES
        && host.bytes().all(letters)
        && port.parse::<u16>().is_ok_and(|port| port != 0)
}

/// What an error message shows of a stranger's text.
fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Names are labels and words in log lines.
const MAX_ID_BYTES: usize = 128;
/// As in DNS.
const MAX_HOST_BYTES: usize = 253;
/// Far above any real base URL.
const MAX_URL_BYTES: usize = 1024;
/// The largest tensor-parallel size in use is 16.
const MAX_RANKS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let check = |text: &str, ok: bool| {
            assert_eq!(BaseUrl::parse("http", text).is_ok(), ok, "{text}");
        };
        check("http://127.0.0.1:8100", true);
        check("http://127.0.0.1:8100/", true);
        check("http://[::1]:8100/prefix", true);
        check("http://engine.local", true);
        check("https://engine.local", true);
        check("127.0.0.1:8100", false);
        check("http://", false);
        check("http://user:word@host", false);
        check("http://host/?q=1", false);
        check("file:///etc/passwd", false);
        check("", false);
        check("http://host:99999", false);
        check("http://host:0", false);
        check("http://host:", false);
        check("http://host:x", false);
        let named = |text: &str| BaseUrl::named("url", text).map(|url| url.to_string()).ok();
        assert_eq!(named(" h:1 ").as_deref(), Some("http://h:1"));
        assert_eq!(named("https://h/").as_deref(), Some("https://h"));
        assert_eq!((named("h"), named(""), named("[::1]")), (None, None, None));
        assert_eq!(named("[::1]:1").as_deref(), Some("http://[::1]:1"));
        let url = BaseUrl::parse("http", "http://h:1/").unwrap();
        assert_eq!(url.join("/v1/models"), "http://h:1/v1/models");
    }
}
