//! Discovery of the proxy through the metadata server in Mooncake's `mooncake.json`.
//!
//! Mooncake's instances find each other through etcd, Redis or Mooncake's own HTTP server. A
//! sidecar needs only one address from that server: the address at which the proxy takes
//! registrations. The proxy writes this address under [`PROXY_KEY`] and writes it again before the
//! key expires. A sidecar reads the key. All three kinds of server support this.

mod http;
mod metadata;

use std::time::Duration;

use common::etcd::{Etcd, EtcdError};
use tokio::time::timeout;

pub use self::metadata::{Metadata, MetadataError};

use self::http::Http;

/// The key under which the proxy publishes the address at which it takes registrations.
pub const PROXY_KEY: &str = "pd-sidecar/proxy";
/// A published address expires after this time, on servers that delete expired keys.
pub const HOLDS: Duration = Duration::from_secs(15);
/// The interval at which the proxy publishes its address again: a third of [`HOLDS`], so that one
/// failed attempt does not remove the address.
pub const EVERY: Duration = Duration::from_secs(5);

/// A failed request to the metadata server.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The server does not answer.
    #[error("cannot reach {server}: {why}")]
    Unreachable {
        /// The kind and address of the server, or the URL of the request.
        server: String,
        /// Reason why the connection or the request failed.
        why: String,
    },
    /// The server gives an unexpected answer.
    #[error("{server} answered {what}")]
    Unexpected {
        /// The kind and address of the server.
        server: String,
        /// Status of the answer, or the part of the answer that is not valid.
        what: String,
    },
}

/// Access to the keys of a metadata server. Each request may open a new connection, because requests
/// are seconds apart.
#[derive(Clone, Debug)]
pub struct Store {
    metadata: Metadata,
    http: Http,
}

impl Store {
    /// Returns a store for this server, without connecting to the server.
    pub fn new(metadata: Metadata) -> Self {
        let http = Http::default();
        Self { metadata, http }
    }

    /// Returns the value of a key, or `None` if the key does not exist.
    ///
    /// # Errors
    /// Fails if the server does not answer in time, or gives an unexpected answer.
    pub async fn find(&self, key: &str) -> Result<Option<String>, StoreError> {
        self.bounded(async {
            match &self.metadata {
                Metadata::Etcd(url) => {
                    let found = self.etcd(url).find(key).await;
                    found.map_err(|e| self.failed(e))
                }
                Metadata::Redis(url) => self.redis(url, redis::cmd("GET").arg(key)).await,
                Metadata::Http(url) => {
                    let (status, body) = self.http.get(&with_key(url, key)).await?;
                    match status {
                        200 => Ok(String::from_utf8(body).ok()),
                        404 => Ok(None),
                        other => Err(self.unexpected(format!("status {other}"))),
                    }
                }
            }
        })
        .await
    }

    /// Sets the value of a key. The key expires after `holds`, except on Mooncake's HTTP server, which
    /// keeps keys for ever.
    ///
    /// # Errors
    /// Fails if the server does not answer in time, or gives an unexpected answer. The server may
    /// nevertheless have stored the value.
    pub async fn publish(&self, key: &str, value: &str, holds: Duration) -> Result<(), StoreError> {
        self.bounded(async {
            match &self.metadata {
                Metadata::Etcd(url) => {
                    let mut etcd = self.etcd(url);
                    let lease = etcd.grant(holds).await.map_err(|e| self.failed(e))?;
                    let put = etcd.put(&lease, key, value).await;
                    put.map_err(|e| self.failed(e))
                }
                Metadata::Redis(url) => {
                    let mut set = redis::cmd("SET");
                    let set = set.arg(key).arg(value).arg("EX").arg(holds.as_secs());
                    self.redis::<()>(url, set).await
                }
                Metadata::Http(url) => {
                    let body = value.to_owned().into_bytes();
                    match self.http.put(&with_key(url, key), body).await? {
                        200..300 => Ok(()),
                        other => Err(self.unexpected(format!("status {other}"))),
                    }
                }
            }
        })
        .await
    }

    fn etcd(&self, url: &str) -> Etcd<Http> {
        Etcd::new(self.http.clone(), vec![url.to_owned()])
    }

    async fn redis<T: redis::FromRedisValue>(
        &self,
        url: &str,
        command: &redis::Cmd,
    ) -> Result<T, StoreError> {
        let failed = |e: redis::RedisError| {
            if e.is_io_error() {
                self.unreachable(e.to_string())
            } else {
                self.unexpected(e.to_string())
            }
        };
        let client = redis::Client::open(url).map_err(failed)?;
        let mut connection = client
            .get_multiplexed_async_connection()
            .await
            .map_err(failed)?;
        command.query_async(&mut connection).await.map_err(failed)
    }

    /// Runs `work`, and fails if it takes longer than [`ANSWER_TIMEOUT`], so that a silent server
    /// does not delay the caller.
    async fn bounded<T>(
        &self,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        match timeout(ANSWER_TIMEOUT, work).await {
            Ok(done) => done,
            Err(_) => Err(self.unreachable(format!("no answer within {ANSWER_TIMEOUT:?}"))),
        }
    }

    /// Converts an error of etcd into an error of the metadata server.
    fn failed(&self, error: EtcdError) -> StoreError {
        match error {
            EtcdError::Unreachable { url, cause } => StoreError::Unreachable {
                server: url,
                why: cause,
            },
            EtcdError::Failed { status, text } => {
                self.unexpected(format!("status {}: {text}", status.as_u16()))
            }
            EtcdError::Unexpected(what) => self.unexpected(what),
            other => self.unexpected(other.to_string()),
        }
    }

    fn unreachable(&self, why: String) -> StoreError {
        let server = self.metadata.to_string();
        StoreError::Unreachable { server, why }
    }

    fn unexpected(&self, what: String) -> StoreError {
        let server = self.metadata.to_string();
        StoreError::Unexpected { server, what }
    }
}

/// Returns the URL of a key. The keys of this crate need no escapes in a query: their only special
/// character is the slash, which a query may contain.
fn with_key(url: &str, key: &str) -> String {
    format!("{url}?key={key}")
}

/// Maximum time for one request. A healthy metadata server answers within milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
