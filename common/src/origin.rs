//! Checks a request's head for signs that a web page sent the request through a browser on this
//! host.
//!
//! A browser on this host also connects from a loopback address, so the address alone does not show that the request
//! comes from a program. A page can read only answers from its own host name. With DNS rebinding the page's host name
//! resolves to this host, but the `Host` header still contains the page's host name.

use std::net::IpAddr;

use http::HeaderMap;
use http::header::HOST;

/// Returns the value of the header `Host`; empty if it is absent or not text.
pub fn host(headers: &HeaderMap) -> &str {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    host.unwrap_or_default()
}

/// Returns true if `HOST[:PORT]` is a loopback address, `localhost`, or a name below `localhost`. The port is not
/// checked, because a tunnel (`ssh -L`) can use another port.
pub fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|at| at.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    match name.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => name == "localhost" || name.ends_with(".localhost"),
    }
}

/// Returns true if the header `Sec-Fetch-Site` says that a page of another site sent the request. Browsers send that
/// header; other programs do not.
pub fn is_of_another_site(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site").map(|site| site.as_bytes());
    site.is_some_and(|site| site != b"same-origin" && site != b"none")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_host() {
        for host in [
            "localhost",
            "LOCALHOST:8000",
            "pd.localhost:1",
            "localhost.:80",
            "127.0.0.2:8000",
            "[::1]:8000",
            "[::ffff:127.0.0.1]",
        ] {
            assert!(is_local(host), "{host}");
        }
        for host in [
            "evil.example",
            "127.0.0.1.evil.example:8000",
            "10.0.0.1:8000",
            "[::2]",
            "",
        ] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn sites_that_browsers_name() {
        let check = |site: &'static str, expect: bool| {
            let mut headers = HeaderMap::new();
            headers.insert("sec-fetch-site", site.parse().unwrap());
            assert_eq!(is_of_another_site(&headers), expect, "{site}");
        };
        check("cross-site", true);
        check("same-site", true);
        check("same-origin", false);
        check("none", false);
        assert!(!is_of_another_site(&HeaderMap::new()));
        assert_eq!(host(&HeaderMap::new()), "");
    }
}
