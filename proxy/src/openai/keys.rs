//! Access control: keys of clients that send requests or change the proxy, and permitted hosts of
//! instances.

use std::net::IpAddr;

use clap::Args;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use ipnet::IpNet;
use subtle::ConstantTimeEq;

mod files;

use self::files::KeyFiles;
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

    /// Keys for the endpoints that change the proxy, separated by commas. Without such a key, only clients on this host
    /// may use these endpoints.
    #[arg(
        long,
        env = "PD_PROXY_ADMIN_KEY",
        value_name = "KEY",
        value_delimiter = ',',
        hide_env_values = true
    )]
    pub admin_key: Vec<String>,

    /// Key that the proxy sends to engines instead of the client's key.
    #[arg(
        long,
        env = "PD_PROXY_ENGINE_KEY",
        value_name = "KEY",
        hide_env_values = true
    )]
    pub engine_key: Option<String>,

    /// Keys in files.
    #[command(flatten)]
    pub files: KeyFiles,

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
            (!is_key(key)).then(|| {
                format!("{flag}: a key must be printable ASCII without spaces, and not empty")
            })
        };
        let mut problems: Vec<_> = keys.chain(admin).chain(engine).filter_map(bad).collect();
        problems.extend(self.files.problems());
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

    /// Returns true if clients need a key.
    pub(crate) fn asks_clients(&self) -> bool {
        !self.api_key.is_empty() || self.files.api_key_file.is_some()
    }

    /// Returns true if there is an admin key.
    fn asks_admins(&self) -> bool {
        !self.admin_key.is_empty() || self.files.admin_key_file.is_some()
    }

    /// Returns the key for engines; `None` if there is none.
    pub(crate) fn key_for_engines(&self) -> Option<String> {
        let of_file = || self.files.present().engine.clone();
        self.engine_key.clone().or_else(of_file)
    }

    fn is_client(&self, headers: &HeaderMap) -> bool {
        holds(headers, [&self.api_key, &self.files.present().api])
    }

    fn is_admin(&self, headers: &HeaderMap) -> bool {
        holds(headers, [&self.admin_key, &self.files.present().admin])
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
    if !access.asks_clients() || access.is_client(headers) {
        return Ok(());
    }
    Err(ApiError::new(
        Code::InvalidApiKey,
        "the request has no API key, or a wrong one",
    ))
}

/// Checks that a client may change the proxy: it has an admin key or, if there is no such key, it is a
/// program on this host.
///
/// # Errors
/// The client must not change the proxy.
pub(crate) fn may_change(
    access: &Access,
    headers: &HeaderMap,
    peer: Option<IpAddr>,
) -> Result<(), ApiError> {
    let is_local = || peer.is_some_and(|peer| peer.to_canonical().is_loopback());
    match access.asks_admins() {
        // A web page does not know the key, and a browser does not add a key by itself. So a request
        // with the right key needs no further check.
        true if access.is_admin(headers) => return Ok(()),
        false if is_local() => return require_local(headers),
        _ => {}
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
    if access.asks_admins() {
        return match access.is_admin(headers) {
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

/// Returns true if a header can have the key.
fn is_key(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic())
}

fn holds(headers: &HeaderMap, keys: [&Vec<String>; 2]) -> bool {
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
    keys.into_iter().flatten().fold(false, |found, key| {
        found | bool::from(key.as_bytes().ct_eq(given))
    })
}

#[cfg(test)]
mod tests;
