//! The channels of a configuration with the protection of each, for `check-config` and `/status`.

use common::identity::Auth;
use serde::Serialize;

use super::{Config, ProxyAddress};
use crate::transport::Kind;
use crate::transport::protection::Protection;

/// A channel on which other processes talk to this sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Channel {
    /// Name, as in PROTOCOL.md.
    #[serde(rename = "channel")]
    pub(crate) name: String,
    /// The address that this sidecar binds, or to which it connects.
    pub(crate) address: String,
    /// The check that a peer must pass, or the things that any process can do.
    pub(crate) protection: String,
}

/// Returns all channels.
pub(crate) fn of(config: &Config) -> Vec<Channel> {
    let auth = config.identity.as_ref().map_or(Auth::Off, |i| i.auth());
    let control = |peers: &str, open: &str| match auth {
        Auth::Require => format!("TLS 1.3, a key of the roster with the role {peers}"),
        Auth::Prefer => format!("prefer: TLS 1.3 with a key of {peers}; without a key {open}"),
        Auth::Off => format!("none: {open}"),
    };
    let mut channels = Vec::new();
    let mut add = |name: &str, address: String, protection: String| {
        channels.push(Channel {
            name: name.to_owned(),
            address,
            protection,
        });
    };
    if let Some(listen) = &config.listen {
        for rank in &listen.ranks {
            let at = |port: u16| format!("{}:{}", listen.host, shown(port));
            add(
                "init",
                at(rank.init),
                control("sender", "any process learns the addresses of the slots"),
            );
            add(
                "alloc",
                at(rank.alloc),
                control("sender", "any process gets slots and can offer KV"),
            );
            if let Some(query) = rank.query {
                let open = "none: any process may ask; the answer is always empty";
                add("query", at(query), open.to_owned());
            }
            if config.transport.kinds().any(Kind::protects_data) {
                add("data", at(rank.tcp), data(config, auth).to_owned());
            }
        }
    }
    if let Some(fetch) = &config.fetch {
        for rank in 0..config.ranks {
            let port = match fetch.port {
                0 => 0,
                first => first.saturating_add(u16::try_from(rank).unwrap_or(u16::MAX)),
            };
            add(
                "fetch",
                format!("{}:{}", fetch.host, shown(port)),
                control(
                    "receiver",
                    "a process that knows a random token gets its KV",
                ),
            );
        }
    }
    if let Some(proxy) = &config.proxy {
        let address = match &proxy.address {
            ProxyAddress::At(at) => at.to_string(),
            ProxyAddress::AskedFor(metadata) => metadata.to_string(),
        };
        add(
            "registration",
            address,
            control(
                "proxy",
                "any process at this address learns ids of requests",
            ),
        );
    }
    // The unix socket, and not this port, takes the command to drain.
    let admin = match auth {
        Auth::Require => {
            "none: any process can read health and metrics; programs of this host can read the status"
        }
        Auth::Prefer | Auth::Off => "none: any process can read the status and metrics",
    };
    add("admin", config.admin.to_string(), admin.to_owned());
    if let Some(host) = &config.ucx.tcp_host {
        add(
            "UCX over TCP",
            host.clone(),
            "none: any process can read and write this process's memory".to_owned(),
        );
    }
    add(
        "local",
        config.socket.display().to_string(),
        "processes of this user".to_owned(),
    );
    channels
}

/// Returns the protection of the built-in TCP transport's data.
fn data(config: &Config, auth: Auth) -> &'static str {
    match (config.data, auth) {
        (Protection::Plain, _) | (_, Auth::Off) => {
            "none: a process that knows a lease's random id can write its slots, and anybody on the path reads KV"
        }
        (Protection::Authenticated, Auth::Require) => {
            "a key of the roster with the role sender; each part has a tag; anybody on the path reads KV"
        }
        (Protection::Sealed, Auth::Require) => {
            "a key of the roster with the role sender; each part is encrypted and has a tag"
        }
        (_, Auth::Prefer) => {
            "prefer: as with require for leases of peers with a key; a peer without a key needs only its lease's id"
        }
    }
}

fn shown(port: u16) -> String {
    match port {
        0 => "any free port".to_owned(),
        port => port.to_string(),
    }
}
