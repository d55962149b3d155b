//! Hosts as users write them: names, IPv4 addresses, and IPv6 addresses with or without brackets.

use std::net::IpAddr;

/// Returns an IPv6 address without its brackets, and any other host as it is.
pub fn bare(host: &str) -> &str {
    let inner = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    inner.unwrap_or(host)
}

/// Returns true if only this machine can reach `host`. A name other than `localhost` counts as public.
pub fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}
