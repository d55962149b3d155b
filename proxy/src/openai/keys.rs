//! Access control: keys of clients that send requests or change the proxy, and permitted hosts of
//! instances.

use std::net::IpAddr;

use clap::Args;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use ipnet::IpNet;
use subtle::ConstantTimeEq;

use crate::openai::error::{ApiError, Code};
use crate::openai::origin::{refuse_pages, require_local};

/// Keys and permitted hosts.
#[derive(Clone, Default, Args)]
pub struct Access {
    /// Keys that clients have to send as `Authorization: Bearer KEY`, separated by commas. If no key is
    /// given, every client may send requests.
    #[arg(
        long,
        env = "PD_PROXY_API_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub api_key: Vec<String>,

    /// Key for the endpoints that change the proxy. Without this key, only clients on this host may use
    /// these endpoints.
    #[arg(
        long,
        env = "PD_PROXY_ADMIN_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    pub admin_key: Option<String>,

    /// Key that the proxy sends to engines instead of the client's key.
    #[arg(
        long,
        env = "PD_PROXY_ENGINE_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    pub engine_key: Option<String>,

    /// Hosts that instances may have, separated by commas: names, `*.domain`, addresses, networks as
    /// `10.0.0.0/8`. If no host is given, every host is permitted.
    #[arg(
        long,
        env = "PD_PROXY_ALLOW",
        value_name = "HOST",
        value_delimiter = ','
    )]
    pub allow: Vec<String>,
}

impl Access {
    /// Returns all problems of the keys and hosts.
    pub fn problems(&self) -> Vec<String> {
        let engine = self.engine_key.iter().map(|key| ("--engine-key", key));
        let admin = self.admin_key.iter().map(|key| ("--admin-key", key));
        let keys = self.api_key.iter().map(|key| ("--api-key", key));
        let bad = |(flag, key): (&str, &String)| {
            let ok = !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic());
            (!ok).then(|| {
                format!("{flag}: a key must be printable ASCII without spaces, and not empty")
            })
        };
        let mut problems: Vec<_> = keys.chain(admin).chain(engine).filter_map(bad).collect();
        for host in &self.allow {
            if host.contains('/') && host.parse::<IpNet>().is_err() {
                problems.push(format!("--allow {host}: write a network as 10.0.0.0/8"));
            } else if !is_host(host) {
                problems.push(format!(
                    "--allow {host:?}: write a name, *.domain, an address or a network, without a port"
                ));
            }
        }
        problems
    }

    /// Checks that the proxy may connect to all these hosts.
    ///
    /// # Errors
    /// A host is not permitted. The error names the first such host.
    pub fn check<'a>(&self, mut hosts: impl Iterator<Item = &'a str>) -> Result<(), String> {
        if self.allow.is_empty() {
            return Ok(());
        }
        match hosts.find(|host| !self.allows(host)) {
            Some(host) => Err(format!("host {host:?} is not permitted (--allow)")),
            None => Ok(()),
        }
    }

    fn allows(&self, host: &str) -> bool {
        let (bare, _) = host.split_once('%').unwrap_or((host, ""));
        let address: Option<IpAddr> = bare.parse().ok();
        self.allow.iter().any(|entry| {
            let suffix = entry
                .strip_prefix('*')
                .filter(|suffix| suffix.starts_with('.'));
            match (address, entry.parse::<IpNet>(), suffix) {
                (Some(address), Ok(network), _) => network.contains(&address),
                (None, _, Some(suffix)) => host.len() > suffix.len() && host.ends_with(suffix),
                _ => entry.eq_ignore_ascii_case(host),
            }
        })
    }
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access")
            .field("api_keys", &self.api_key.len())
            .field("allow", &self.allow)
            .finish_non_exhaustive()
    }
}

/// Checks that a client may send requests.
///
/// # Errors
/// The client has no key, or a wrong key.
pub(crate) fn may_ask(access: &Access, headers: &HeaderMap) -> Result<(), ApiError> {
    if access.api_key.is_empty() || holds(headers, &access.api_key) {
        return Ok(());
    }
    Err(ApiError::new(
        Code::InvalidApiKey,
        "the request has no API key, or a wrong one",
    ))
}

/// Checks that a client may change the proxy: it has the admin key or, if `--admin-key` is not set, it
/// is a program on this host.
///
/// # Errors
/// The client must not change the proxy.
pub(crate) fn may_change(
    access: &Access,
    headers: &HeaderMap,
    peer: Option<IpAddr>,
) -> Result<(), ApiError> {
    let allowed = match &access.admin_key {
        Some(key) => holds(headers, std::slice::from_ref(key)),
        None => peer.is_some_and(|peer| peer.to_canonical().is_loopback()),
    };
    if allowed {
        // A web page does not know the key, and a browser does not add a key by itself. So a request
        // with the right key needs no further check.
        return match access.admin_key {
            Some(_) => Ok(()),
            None => require_local(headers),
        };
    }
    Err(ApiError::new(
        Code::NotPermitted,
        "this endpoint needs the key of --admin-key or, if the proxy has none, a client on the proxy's host",
    ))
}

/// Checks that a client may read the pages about instances and requests. With an admin key only its holders may read them.
/// Without one, clients of other hosts need the key of clients, if there is one. On this host every program may read them,
/// except a web page in a browser, which could read the answer after DNS rebinding.
///
/// # Errors
/// The client has no such key, or the request seems to come from a web page.
pub(crate) fn may_read(
    access: &Access,
    headers: &HeaderMap,
    peer: Option<IpAddr>,
) -> Result<(), ApiError> {
    if let Some(key) = &access.admin_key {
        return match holds(headers, std::slice::from_ref(key)) {
            true => Ok(()),
            false => Err(ApiError::new(
                Code::NotPermitted,
                "this page needs the key of --admin-key",
            )),
        };
    }
    match peer.is_some_and(|peer| peer.to_canonical().is_loopback()) {
        true => refuse_pages(headers),
        false => may_ask(access, headers),
    }
}

/// Returns true for a name, `*.domain`, an address or a network.
fn is_host(text: &str) -> bool {
    let letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'*');
    let is_name = !text.is_empty() && text.bytes().all(letter);
    is_name || text.parse::<IpNet>().is_ok() || text.parse::<IpAddr>().is_ok()
}

fn holds(headers: &HeaderMap, keys: &[String]) -> bool {
    let value = headers
        .get(AUTHORIZATION)
        .map_or(&[][..], |value| value.as_bytes());
    let given = value
        .split_at_checked(7)
        .filter(|(kind, _)| kind.eq_ignore_ascii_case(b"bearer "));
    let Some((_, given)) = given else {
        return false;
    };
    // The comparison covers every key and takes constant time, so that a client learns nothing about a
    // key from the time of an answer.
    keys.iter().fold(false, |found, key| {
        found | bool::from(key.as_bytes().ct_eq(given))
    })
}

#[cfg(test)]
mod tests;
