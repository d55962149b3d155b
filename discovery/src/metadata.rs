//! The metadata server in `mooncake.json`.

use std::fmt;

/// A metadata server with the base URL of its requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Metadata {
    /// etcd's JSON gateway.
    Etcd(String),
    /// Redis.
    Redis(String),
    /// Mooncake's own HTTP server.
    Http(String),
}

/// An error in `metadata_server` or `metadata_backend`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// `metadata_backend`, or the scheme of `metadata_server`, is not a known kind of server.
    #[error("`{0}` is not one of etcd, redis, http")]
    Backend(String),
    /// `metadata_server` has no host, or contains white space.
    #[error("`{0}` is not the address of a server")]
    Server(String),
}

impl Metadata {
    /// Parses the two values of `mooncake.json`. Returns `None` for the value `P2PHANDSHAKE`, which means that Mooncake
    /// uses no metadata server.
    ///
    /// If `backend` is absent, the scheme of `server` selects the kind. If the scheme is absent too, the
    /// kind is etcd, as in Mooncake.
    ///
    /// # Errors
    /// Fails if the kind is unknown, if `server` has no host, or if it contains white space.
    pub fn parse(server: &str, backend: Option<&str>) -> Result<Option<Self>, MetadataError> {
        let server = server.trim();
        if server.eq_ignore_ascii_case("P2PHANDSHAKE") {
            return Ok(None);
        }
        let (scheme, rest) = match server.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            None => ("", server),
        };
        let rest = rest.trim_end_matches('/');
        let host = rest.rsplit('@').next().unwrap_or(rest);
        let named = backend.map(str::trim).filter(|b| !b.is_empty());
        let kind = match (named, scheme) {
            (Some(backend), _) => backend,
            (None, "") => "etcd",
            (None, scheme) => scheme,
        };
        if host.is_empty() || host.starts_with(':') || rest.contains(char::is_whitespace) {
            return Err(MetadataError::Server(server.to_owned()));
        }
        match kind.to_ascii_lowercase().as_str() {
            "etcd" => Ok(Some(Self::Etcd(format!(
                "http://{}",
                with_port(rest, 2379)
            )))),
            "redis" => Ok(Some(Self::Redis(format!(
                "redis://{}",
                with_port(rest, 6379)
            )))),
            "http" => Ok(Some(Self::Http(format!("http://{rest}")))),
            other => Err(MetadataError::Backend(other.to_owned())),
        }
    }
}

impl fmt::Display for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, url) = match self {
            Self::Etcd(url) => ("etcd", url),
            Self::Redis(url) => ("redis", url),
            Self::Http(url) => ("http", url),
        };
        // Logs and error texts show this value, so it must not contain the password of the URL.
        let shown = match url.split_once("://") {
            Some((_, rest)) => rest.rsplit('@').next().unwrap_or(rest),
            None => url,
        };
        write!(f, "{kind} at {shown}")
    }
}

fn with_port(address: &str, port: u16) -> String {
    let host = address.rsplit('@').next().unwrap_or(address);
    if host
        .rsplit(']')
        .next()
        .is_some_and(|tail| tail.contains(':'))
    {
        address.to_owned()
    } else {
        format!("{address}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(server: &str, backend: Option<&str>, expect: &str) {
        let shown = match Metadata::parse(server, backend) {
            Ok(Some(metadata)) => format!("{metadata:?}"),
            Ok(None) => "none".to_owned(),
            Err(error) => error.to_string(),
        };
        assert_eq!(shown, expect, "{server} {backend:?}");
    }

    #[test]
    fn servers_as_mooncake_names_them() {
        check("10.0.0.9:2379", None, r#"Etcd("http://10.0.0.9:2379")"#);
        check("10.0.0.9", Some("etcd"), r#"Etcd("http://10.0.0.9:2379")"#);
        check("etcd://a:1", None, r#"Etcd("http://a:1")"#);
        check("http://a:2379", Some("etcd"), r#"Etcd("http://a:2379")"#);
        check("redis://a:6380", None, r#"Redis("redis://a:6380")"#);
        check("[::1]", Some("redis"), r#"Redis("redis://[::1]:6379")"#);
        let http = r#"Http("http://a:8080/metadata")"#;
        check("http://a:8080/metadata/", Some("http"), http);
        check("P2PHANDSHAKE", Some("etcd"), "none");
        check("a:1", Some("zk"), "`zk` is not one of etcd, redis, http");
        check(
            "redis://",
            None,
            "`redis://` is not the address of a server",
        );
        check(":1", None, "`:1` is not the address of a server");
    }

    #[test]
    fn a_password_is_not_shown() {
        let metadata = Metadata::parse("redis://:secret@a", None).unwrap().unwrap();
        assert_eq!(metadata.to_string(), "redis at a:6379");
    }
}
