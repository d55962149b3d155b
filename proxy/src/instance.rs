//! An instance: one vLLM and its sidecar, as the proxy knows it.

use std::fmt;

use http::Uri;
use protocol::registration::{InstanceRole, Register};
use serde::{Serialize, Serializer};

/// One registered instance. What routing, `/instances` and the legs read.
#[derive(Clone, Debug, Serialize)]
pub struct Instance {
    /// The sidecar's name.
    pub id: String,
    /// The sidecar's epoch.
    pub epoch: u64,
    /// Which legs it takes.
    pub role: InstanceRole,
    /// The engine's OpenAI server.
    pub http: BaseUrl,
    /// The sidecar's admin server.
    pub admin: BaseUrl,
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
    /// Whether it gets requests.
    pub standing: Standing,
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
    #[error("{field} {value:?} is not an http:// URL with a host")]
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
}

impl Instance {
    /// Checks a registration and turns it into an instance that is not verified yet.
    ///
    /// # Errors
    /// The first field that cannot be used.
    pub fn parse(register: &Register) -> Result<Self, Unusable> {
        let id = &register.id;
        if id.is_empty() || id.len() > MAX_ID_BYTES || !id.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(Unusable::Id(shortened(id)));
        }
        let (init, alloc) = (register.init_ports.len(), register.alloc_ports.len());
        let receives = register.role != InstanceRole::Prefill;
        if init != alloc || init > MAX_RANKS || (receives && init == 0) {
            return Err(Unusable::Ports { init, alloc });
        }
        let host_ok = register.host.len() <= MAX_HOST_BYTES
            && register.host.bytes().all(|b| b.is_ascii_graphic());
        if !host_ok || (receives && register.host.is_empty()) {
            return Err(Unusable::Host(shortened(&register.host)));
        }
        Ok(Self {
            id: id.clone(),
            epoch: register.epoch.0,
            role: register.role,
            http: BaseUrl::parse("http", &register.http)?,
            admin: BaseUrl::parse("admin", &register.admin)?,
            host: register.host.clone(),
            init_ports: register.init_ports.clone(),
            alloc_ports: register.alloc_ports.clone(),
            slots: register.slots,
            free_slots: register.free_slots,
            parked_tokens: register.parked_tokens,
            standing: Standing::Unverified,
        })
    }

    /// It gets requests.
    pub fn is_ready(&self) -> bool {
        self.standing == Standing::Ready
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
            && self.host == other.host
            && self.init_ports == other.init_ports
            && self.alloc_ports == other.alloc_ports
    }
}

impl BaseUrl {
    /// Checks an URL.
    ///
    /// # Errors
    /// Not `http://`, no host, user information, a query, or too long.
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
        if uri.scheme_str() != Some("http")
            || authority.host().is_empty()
            || authority.as_str().contains('@')
            || uri.query().is_some()
        {
            return Err(refused());
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
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
        check("https://engine.local", false);
        check("127.0.0.1:8100", false);
        check("http://", false);
        check("http://user:word@host", false);
        check("http://host/?q=1", false);
        check("file:///etc/passwd", false);
        check("", false);
        let url = BaseUrl::parse("http", "http://h:1/").unwrap();
        assert_eq!(url.join("/v1/models"), "http://h:1/v1/models");
    }
}
