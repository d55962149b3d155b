//! The base URL of an HTTP server.

use std::fmt;
use std::net::Ipv6Addr;

use http::Uri;
use http::uri::Authority;
use serde::{Serialize, Serializer};

use crate::fleet::zone;

/// Base URL of an HTTP server: scheme, authority and an optional path prefix, without a final slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseUrl {
    text: String,
    /// The URL in a form that `http::Uri` accepts; `None` if the host has no IPv6 zone, so that `text`
    /// itself can be used.
    carried: Option<String>,
}

/// A text that is not the address of a server that the proxy may call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    /// A URL that the proxy cannot call.
    #[error("{field} {value:?} is not an http:// or https:// URL with a host and, if any, a port")]
    Url {
        /// `http` or `admin`.
        field: &'static str,
        /// The text that was registered.
        value: String,
    },
    /// An instance's address that is not exactly scheme, host and port.
    #[error(
        "{field} {value:?} is not scheme, host and port alone, as http://10.0.0.1:8000 or https://[::1]:8000: \
         an instance's address has no path, query, fragment or user"
    )]
    Origin {
        /// `url`, `http` or `admin`.
        field: &'static str,
        /// The text that was registered.
        value: String,
    },
}

impl BaseUrl {
    /// Checks a URL, which may have a path prefix.
    ///
    /// # Errors
    /// The scheme is neither `http` nor `https`; the host is missing; the port is not valid; the URL has
    /// user information, a query or a fragment; or the URL is too long.
    pub fn parse(field: &'static str, text: &str) -> Result<Self, BadUrl> {
        let refused = || BadUrl::Url {
            field,
            value: shortened(text),
        };
        if text.len() > MAX_URL_BYTES {
            return Err(refused());
        }
        let carried = zone::carried(text);
        let uri = carried.as_deref().unwrap_or(text).parse::<Uri>();
        let uri = uri.map_err(|_| refused())?;
        let authority = uri.authority().ok_or_else(refused)?;
        if !matches!(uri.scheme_str(), Some("http" | "https"))
            || !is_host(authority.host())
            || authority.as_str().contains('@')
            || !has_port_if_any(authority)
            // `Uri` drops a fragment silently. If the fragment stayed in the text, the path that `join`
            // adds would become part of the fragment.
            || text.contains(['#', '?', '\\'])
        {
            return Err(refused());
        }
        let scheme = uri.scheme_str().unwrap_or_default();
        let path = uri.path().trim_end_matches('/');
        let plain = format!("{scheme}://{authority}{path}");
        let zoned = carried.as_ref().and_then(|_| zone::of(authority.host()));
        Ok(match zoned {
            None => Self {
                text: plain,
                carried: None,
            },
            Some((address, zone)) => Self {
                text: plain.replacen(authority.host(), &format!("[{address}%{zone}]"), 1),
                carried: Some(plain),
            },
        })
    }

    /// Checks the address of an instance: only scheme, host and port. A registration names the server
    /// that the proxy calls, but must not choose the path of the call.
    ///
    /// # Errors
    /// [`BaseUrl::parse`] refuses the text, or the URL has a path.
    pub fn origin(field: &'static str, text: &str) -> Result<Self, BadUrl> {
        match Self::parse(field, text) {
            Ok(url) if url.text.matches('/').count() == 2 => Ok(url),
            _ => Err(BadUrl::Origin {
                field,
                value: shortened(text),
            }),
        }
    }

    /// Checks a URL that an operator has written. As in the demos' environment files, host and port
    /// without a scheme are enough.
    ///
    /// # Errors
    /// [`BaseUrl::origin`] refuses the text, or the text is a host with neither scheme nor port.
    pub fn named(field: &'static str, text: &str) -> Result<Self, BadUrl> {
        let text = text.trim();
        if text.contains("://") {
            return Self::origin(field, text);
        }
        let url = Self::origin(field, &format!("http://{text}"))?;
        let authority = url.authority();
        if authority.contains(':') && !authority.ends_with(']') {
            return Ok(url);
        }
        Err(BadUrl::Origin {
            field,
            value: shortened(text),
        })
    }

    /// Returns host and port as they are written in the URL.
    pub fn authority(&self) -> &str {
        let (_, rest) = self.text.split_once("://").unwrap_or_default();
        rest.split('/').next().unwrap_or_default()
    }

    /// Returns the host. An IPv6 address is returned without its brackets, but with its zone if it has a
    /// zone.
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

    /// Returns true if the scheme is `https`.
    pub fn is_tls(&self) -> bool {
        self.text.starts_with("https:")
    }

    /// Returns the URL of `path`, which begins with a slash, in a form that `http::Uri` accepts.
    pub fn join(&self, path: &str) -> String {
        let base = self.carried.as_ref().unwrap_or(&self.text);
        format!("{base}{path}")
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for BaseUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// Returns true for a name, an IPv4 address, or an IPv6 address in brackets.
fn is_host(host: &str) -> bool {
    if let Some(address) = host.strip_prefix('[') {
        let address = address.strip_suffix(']').unwrap_or_default();
        return address.parse::<Ipv6Addr>().is_ok();
    }
    let letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !host.is_empty() && host.bytes().all(letter)
}

fn has_port_if_any(authority: &Authority) -> bool {
    let is_given = authority.as_str().len() > authority.host().len();
    !is_given || authority.port_u16().is_some_and(|port| port != 0)
}

/// Returns the first 80 characters of a text from outside, for an error message.
pub(crate) fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

/// The longest URL that is accepted, in bytes: far above any real base URL.
const MAX_URL_BYTES: usize = 1024;

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
        check("http://host#", false);
        check("http://host?", false);
        check("http://host/a#b", false);
        check("http://host\\a", false);
        check("http://ho*st", false);
        check("http://[::1", false);
        let origin = |text: &str| {
            BaseUrl::origin("http", text)
                .map(|url| url.to_string())
                .ok()
        };
        assert_eq!(origin("HTTP://h:1/").as_deref(), Some("http://h:1"));
        assert_eq!(
            origin("https://[::1]:1").as_deref(),
            Some("https://[::1]:1")
        );
        for tail in ["/a", "//a", "/a#", "#", "?x", "/%2e", "/v1"] {
            assert_eq!(origin(&format!("http://h:1{tail}")), None, "{tail}");
        }
        let named = |text: &str| BaseUrl::named("url", text).map(|url| url.to_string()).ok();
        assert_eq!(named(" h:1 ").as_deref(), Some("http://h:1"));
        assert_eq!(named("https://h/").as_deref(), Some("https://h"));
        assert_eq!((named("h"), named(""), named("[::1]")), (None, None, None));
        assert_eq!(named("[::1]:1").as_deref(), Some("http://[::1]:1"));
        let url = BaseUrl::named("url", "[fe80::1%25lo]:1").unwrap();
        assert_eq!(
            (url.to_string().as_str(), url.authority(), url.host()),
            ("http://[fe80::1%lo]:1", "[fe80::1%lo]:1", "fe80::1%lo")
        );
        assert_eq!(BaseUrl::origin("http", &url.to_string()).unwrap(), url);
        assert_eq!(url.join("/a"), "http://fe80--1.lo.zone.invalid:1/a");
        check("http://[fe80::1%lo/]:1", false);
        check("http://host%lo:1", false);
        let url = BaseUrl::parse("http", "http://h:1/").unwrap();
        assert_eq!(url.join("/v1/models"), "http://h:1/v1/models");
    }
}
