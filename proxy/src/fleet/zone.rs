//! IPv6 addresses with a zone, such as `fe80::1%eth0`: a link-local address is complete only with the interface.
//!
//! `http::Uri` does not accept a zone. Inside a URL the proxy therefore replaces the address and its zone by
//! a host name that no DNS server knows, `fe80--1.eth0.zone.invalid`. [`Resolver`] turns the name back into
//! the address.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::vec;

use hyper_util::client::legacy::connect::dns::Name;
use tower::Service;

/// Returns the host name that stands for `ADDRESS%ZONE`; `None` if `host` is not an IPv6 address with a
/// zone.
pub(crate) fn name(host: &str) -> Option<String> {
    let (address, zone) = host.split_once('%')?;
    // RFC 6874 writes `%25eth0` in a URL. A zone that is a number stays as it is, because `257` is
    // interface 257 and not an escaped 7.
    let is_name = |zone: &&str| zone.starts_with(|c: char| c.is_ascii_alphabetic());
    let zone = zone.strip_prefix("25").filter(is_name).unwrap_or(zone);
    let letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    let address = address.parse::<Ipv6Addr>().ok()?;
    let is_zone = (1..=MAX_ZONE_BYTES).contains(&zone.len()) && zone.bytes().all(letter);
    is_zone.then(|| format!("{}.{zone}{SUFFIX}", address.to_string().replace(':', "-")))
}

/// Returns the address and the zone for which a host name stands; `None` for any other host name.
pub(crate) fn of(name: &str) -> Option<(Ipv6Addr, &str)> {
    let (address, zone) = name.strip_suffix(SUFFIX)?.split_once('.')?;
    Some((address.replace('-', ":").parse().ok()?, zone))
}

/// Returns a URL with a zone in a form that `http::Uri` accepts; `None` if the URL's host has no zone.
pub(crate) fn carried(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://[")?;
    let (host, rest) = rest.split_once(']')?;
    Some(format!("{scheme}://{}{rest}", name(host)?))
}

/// Resolves names as the operating system does, and turns the names of this module back into addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Resolver;

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        Box::pin(async move {
            let host = match of(name.as_str()) {
                Some((address, zone)) => format!("{address}%{zone}"),
                None => name.as_str().to_owned(),
            };
            let found = tokio::net::lookup_host((host.as_str(), 0)).await?;
            Ok(found.collect::<Vec<_>>().into_iter())
        })
    }
}

/// RFC 2606 reserves `.invalid`, so the suffix can never be part of a real host name.
const SUFFIX: &str = ".zone.invalid";

/// The longest interface name in bytes: `IFNAMSIZ` without its terminator.
const MAX_ZONE_BYTES: usize = 15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones() {
        let check = |host: &str, expect: Option<&str>| {
            let name = name(host);
            let back = name.as_deref().and_then(of);
            let back = back.map(|(address, zone)| format!("{address}%{zone}"));
            assert_eq!(back.as_deref(), expect, "{host} {name:?}");
        };
        check("fe80::1%lo", Some("fe80::1%lo"));
        check("fe80::1%25eth0.100", Some("fe80::1%eth0.100"));
        check("fe80::1%257", Some("fe80::1%257"));
        check("FE80::A:1%2", Some("fe80::a:1%2"));
        check("fe80::1", None);
        check("fe80::1%", None);
        check("fe80::1%a/b", None);
        check("fe80::1%interface-of-a-long-name", None);
        check("10.0.0.1%lo", None);
        check("host%lo", None);
    }
}
