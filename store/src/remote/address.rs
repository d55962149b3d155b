//! The address of a remote store, as `--remote` gives it.

use std::fmt;
use std::str::FromStr;

/// The kind and the place of a remote store. It never contains a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// One Valkey or Redis server.
    Redis {
        /// The server.
        node: Node,
        /// Number of the database.
        database: i64,
        /// True if the connection is TLS.
        tls: bool,
    },
    /// A cluster of Valkey or Redis servers. The other nodes are learnt from these.
    Cluster {
        /// At least one node.
        nodes: Vec<Node>,
        /// True if the connections are TLS.
        tls: bool,
    },
    /// A bucket of an object store with Amazon's S3 protocol.
    S3 {
        /// Name of the bucket.
        bucket: String,
    },
}

/// A server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Name or address; an IPv6 address is without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// A text that is no address of a remote store. The text is not shown, because it may contain a password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// The scheme is unknown or absent.
    #[error(
        "the address must begin with redis://, rediss://, redis-cluster://, rediss-cluster:// or s3://"
    )]
    Scheme,
    /// There is a user or a password in the address.
    #[error(
        "the address has a user or a password, which every user of this host can see: write them into a file and name \
         the file with --remote-credentials"
    )]
    Secret,
    /// A host or its port is wrong.
    #[error(
        "the address must be redis://HOST:PORT, redis://HOST:PORT/DATABASE or redis-cluster://HOST:PORT,HOST:PORT"
    )]
    Node,
    /// The number of the database is wrong.
    #[error("the database must be a number from 0 to 65535, as in redis://HOST:PORT/0")]
    Database,
    /// The name of the bucket is wrong.
    #[error(
        "the address must be s3://BUCKET, with letters, digits, dots and hyphens; --remote-prefix names a folder"
    )]
    Bucket,
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (scheme, rest) = text.split_once("://").ok_or(AddressError::Scheme)?;
        if rest.contains('@') {
            return Err(AddressError::Secret);
        }
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        match scheme {
            "redis" | "rediss" => {
                let (node, database) = rest.split_once('/').unwrap_or((rest, "0"));
                let database: u16 = database.parse().map_err(|_| AddressError::Database)?;
                Ok(Self::Redis {
                    node: node.parse()?,
                    database: database.into(),
                    tls: scheme == "rediss",
                })
            }
            "redis-cluster" | "rediss-cluster" => Ok(Self::Cluster {
                nodes: rest.split(',').map(str::parse).collect::<Result<_, _>>()?,
                tls: scheme == "rediss-cluster",
            }),
            "s3" if is_bucket(rest) => Ok(Self::S3 {
                bucket: rest.to_owned(),
            }),
            "s3" => Err(AddressError::Bucket),
            _ => Err(AddressError::Scheme),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Redis {
                node,
                database,
                tls,
            } => write!(f, "redis{}://{node}/{database}", s_if(*tls)),
            Self::Cluster { nodes, tls } => {
                write!(f, "redis{}-cluster://", s_if(*tls))?;
                for (at, node) in nodes.iter().enumerate() {
                    write!(f, "{}{node}", if at == 0 { "" } else { "," })?;
                }
                Ok(())
            }
            Self::S3 { bucket } => write!(f, "s3://{bucket}"),
        }
    }
}

impl FromStr for Node {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (host, port) = text.rsplit_once(':').ok_or(AddressError::Node)?;
        let port = port.parse().map_err(|_| AddressError::Node)?;
        let six = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let host = six.unwrap_or(host);
        let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let fits = match six {
            Some(six) => six.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.chars().all(known),
        };
        if port == 0 || !fits {
            return Err(AddressError::Node);
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

fn s_if(tls: bool) -> &'static str {
    if tls { "s" } else { "" }
}

fn is_bucket(text: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    (3..=63).contains(&text.len()) && text.chars().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_as_it_was_given() {
        for text in [
            "redis://cache:6379/0",
            "rediss://[2001:db8::1]:6380/3",
            "redis-cluster://10.0.0.1:7000,10.0.0.2:7000",
            "rediss-cluster://a:1",
            "s3://kv.bucket-1",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        let short: Address = "redis://cache:6379".parse().unwrap();
        assert_eq!(short.to_string(), "redis://cache:6379/0");
    }

    #[test]
    fn a_mistake_is_named_without_the_text() {
        for (text, error) in [
            ("cache:6379", AddressError::Scheme),
            ("http://cache:6379", AddressError::Scheme),
            ("redis://user:secret@cache:6379", AddressError::Secret),
            ("s3://key:secret@bucket", AddressError::Secret),
            ("redis://cache", AddressError::Node),
            ("redis://cache:0", AddressError::Node),
            ("redis://:1", AddressError::Node),
            ("redis://a b:1", AddressError::Node),
            ("redis-cluster://a:1,", AddressError::Node),
            ("redis://cache:1/x", AddressError::Database),
            ("redis://cache:1/-1", AddressError::Database),
            ("s3://", AddressError::Bucket),
            ("s3://bucket/folder", AddressError::Bucket),
        ] {
            assert_eq!(text.parse::<Address>().unwrap_err(), error, "{text}");
            assert!(!error.to_string().contains("secret"));
        }
    }
}
