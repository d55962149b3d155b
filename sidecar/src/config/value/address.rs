//! Hosts, addresses and URLs.

use std::fmt;

use common::host::{bare, is_loopback};

use super::{Value, scalar};
use crate::config::yaml::Raw;

/// A host name or address without a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host(pub(crate) String);

impl Value for Host {
    const WANT: &'static str = "a host name or an address without a port: 10.0.0.2";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        host(scalar(raw)?.trim()).map(Self)
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// A host and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostPort {
    /// Host name or address, without brackets.
    pub(crate) host: String,
    /// Port. For an address to bind, 0 means any free port.
    pub(crate) port: u16,
}

impl HostPort {
    /// Returns true if only this machine can reach the host.
    pub(crate) fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Value for HostPort {
    const WANT: &'static str = "host:port: 127.0.0.1:7500 or [::1]:7500";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let text = scalar(raw)?.trim();
        let text = text.strip_prefix("tcp://").unwrap_or(text);
        let (host_text, port_text) = text.rsplit_once(':').ok_or("no port")?;
        let bare = match host_text
            .strip_prefix('[')
            .and_then(|h| h.strip_suffix(']'))
        {
            Some(inner) => inner,
            None if host_text.contains(':') => {
                return Err("an IPv6 address without brackets".to_owned());
            }
            None => host_text,
        };
        Ok(Self {
            host: host(bare)?,
            port: port_text
                .parse()
                .map_err(|_| format!("`{port_text}` is not a port"))?,
        })
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// A base URL of an HTTP server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Url(pub(crate) String);

impl Value for Url {
    const WANT: &'static str = "a base URL: http://127.0.0.1:8100";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let text = scalar(raw)?.trim().trim_end_matches('/');
        let rest = text
            .strip_prefix("http://")
            .or_else(|| text.strip_prefix("https://"))
            .ok_or("neither http:// nor https://")?;
        if rest.is_empty() || rest.contains(|c: char| c.is_whitespace() || "?#@".contains(c)) {
            return Err(
                "not a base URL: it has no host, or has a query, a fragment, an @ or white space"
                    .to_owned(),
            );
        }
        let authority = rest.split('/').next().unwrap_or_default();
        if !authority.starts_with('[') && authority.matches(':').count() > 1 {
            return Err("an IPv6 address without brackets".to_owned());
        }
        Ok(Self(text.to_owned()))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

/// Returns true if `host` means every interface, so that a peer cannot connect to it.
pub(crate) fn is_wildcard(host: &str) -> bool {
    host == "*"
        || host
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_unspecified())
}

/// Returns true for an IPv6 address with a zone: `fe80::1%eth0`.
fn has_zone(host: &str) -> bool {
    let zone = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    host.split_once('%').is_some_and(|(address, name)| {
        address.parse::<std::net::Ipv6Addr>().is_ok() && !name.is_empty() && name.chars().all(zone)
    })
}

fn host(text: &str) -> Result<String, String> {
    let inner = bare(text);
    if inner.parse::<std::net::IpAddr>().is_ok() || inner == "*" || has_zone(inner) {
        return Ok(inner.to_owned());
    }
    let name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    match inner {
        "" => Err("empty".to_owned()),
        _ if inner.contains("://") => Err("a URL".to_owned()),
        _ if inner.contains(':') => Err("with a port".to_owned()),
        _ if inner.len() <= 253 && inner.chars().all(name) => Ok(inner.to_owned()),
        _ => Err("not a host name".to_owned()),
    }
}
