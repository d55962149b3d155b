//! Where the proxy is: one key in the metadata server that Mooncake's `mooncake.json` names.
//!
//! Mooncake's sides find each other through etcd, Redis or an HTTP server of its own. Sidecars need
//! less: where to register. The proxy writes that under [`PROXY_KEY`], and writes it again before it
//! runs out; a sidecar reads it. All three servers can do both.

mod http;
mod metadata;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::time::timeout;

pub use self::metadata::{Metadata, MetadataError};

use self::http::Http;

/// Under which the proxy says where it takes registrations.
pub const PROXY_KEY: &str = "pd-sidecar/proxy";
/// How long what it says holds, where the server forgets by itself.
pub const HOLDS: Duration = Duration::from_secs(15);
/// How often it says it.
pub const EVERY: Duration = Duration::from_secs(5);

/// The metadata server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nobody answers.
    #[error("{server} is not reached: {why}")]
    Unreachable {
        /// Its address.
        server: String,
        /// Why.
        why: String,
    },
    /// It answers something else than expected.
    #[error("{server} answered {what}")]
    Unexpected {
        /// Its address.
        server: String,
        /// What.
        what: String,
    },
}

/// Keys in a metadata server. A connection is made for each question: there is one in seconds.
#[derive(Clone, Debug)]
pub struct Store {
    metadata: Metadata,
    http: Http,
}

impl Store {
    /// The store in this server.
    pub fn new(metadata: Metadata) -> Self {
        let http = Http::default();
        Self { metadata, http }
    }

    /// The value of a key, if it has one.
    ///
    /// # Errors
    /// The server is away or broken.
    pub async fn find(&self, key: &str) -> Result<Option<String>, StoreError> {
        self.bounded(async {
            match &self.metadata {
                Metadata::Etcd(url) => {
                    let answer = self.etcd(url, "kv/range", json!({"key": b64(key)})).await?;
                    let value = answer["kvs"][0]["value"].as_str();
                    Ok(value.and_then(|v| String::from_utf8(STANDARD.decode(v).ok()?).ok()))
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

    /// Gives a key a value, for `holds` where the server can forget (Mooncake's HTTP server cannot).
    ///
    /// # Errors
    /// It may not have it.
    pub async fn publish(&self, key: &str, value: &str, holds: Duration) -> Result<(), StoreError> {
        self.bounded(async {
            match &self.metadata {
                Metadata::Etcd(url) => {
                    let ttl = json!({"TTL": holds.as_secs()});
                    let lease = self.etcd(url, "lease/grant", ttl).await?["ID"].clone();
                    let pair = json!({"key": b64(key), "value": b64(value), "lease": lease});
                    self.etcd(url, "kv/put", pair).await.map(drop)
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

    async fn etcd(&self, url: &str, method: &str, body: Value) -> Result<Value, StoreError> {
        let url = format!("{url}/v3/{method}");
        let (status, answer) = self.http.post(&url, body.to_string().into_bytes()).await?;
        if status != 200 {
            let text: String = String::from_utf8_lossy(&answer).chars().take(200).collect();
            return Err(self.unexpected(format!("status {status}: {text}")));
        }
        serde_json::from_slice(&answer).map_err(|e| self.unexpected(e.to_string()))
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

    async fn bounded<T>(
        &self,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        match timeout(ANSWER_TIMEOUT, work).await {
            Ok(done) => done,
            Err(_) => Err(self.unreachable(format!("no answer within {ANSWER_TIMEOUT:?}"))),
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

fn b64(text: &str) -> String {
    STANDARD.encode(text)
}

/// Keys of ours have no character that a query has to escape but the slash, which it may hold.
fn with_key(url: &str, key: &str) -> String {
    format!("{url}?key={key}")
}

/// A metadata server answers within milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
