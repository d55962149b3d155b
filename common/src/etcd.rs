//! The part of etcd's key-value API that this project needs: leases, keys with a lease, and a watch. The proxies use
//! etcd for their shared registry, and the sidecars use it to find the proxy.
//!
//! The client uses etcd's own JSON gateway (`/v3/...`), which every etcd since 3.4 serves at its client
//! port. A gRPC client would add a second HTTP stack and a protocol compiler for five calls.

use std::fmt::Display;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::{Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};
use tokio::time::timeout;

/// The HTTP client below the gateway. Each program has its own client, with its own connections and its own TLS.
pub trait Post: Sync {
    /// The body of an answer.
    type Body: Body<Data = Bytes, Error: Into<BoxError>> + Send + Unpin;
    /// Reason why there is no answer.
    type Error: Display;

    /// Posts JSON and returns as soon as the head of the answer has come. The caller limits the
    /// time.
    fn post(
        &self,
        url: &str,
        body: Bytes,
    ) -> impl Future<Output = Result<Response<Self::Body>, Self::Error>> + Send;
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A client of one etcd cluster, which may have several addresses.
#[derive(Debug)]
pub struct Etcd<C> {
    client: C,
    urls: Vec<String>,
    /// Index in `urls` of the address that answered last. The client asks this address first.
    at: usize,
}

/// A lease of etcd. etcd deletes the keys of the lease if the lease is not renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease(String);

/// Error of a call to etcd.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The client has no address of etcd.
    #[error("etcd: no address")]
    NoAddress,
    /// No address answers.
    #[error("etcd: {url}: {cause}")]
    Unreachable {
        /// The URL of the last request.
        url: String,
        /// Reason why the last request failed.
        cause: String,
    },
    /// etcd answered with an error.
    #[error("etcd answered {status}: {text}")]
    Failed {
        /// The status of the answer.
        status: StatusCode,
        /// The beginning of the answer, or the request that etcd refused.
        text: String,
    },
    /// etcd gave an unexpected answer.
    #[error("etcd answered {0}")]
    Unexpected(String),
    /// The lease has run out.
    #[error("the lease has run out")]
    LeaseLost,
}

/// A watch over keys. An event only tells the caller to read the keys again.
#[derive(Debug)]
pub struct Watch<B> {
    body: B,
    /// First part of an event whose last part has not come yet.
    partial: Vec<u8>,
}

impl<C: Post> Etcd<C> {
    /// Creates a client of the etcd at these base URLs.
    pub fn new(client: C, urls: Vec<String>) -> Self {
        Self {
            client,
            urls,
            at: 0,
        }
    }

    /// Gets a new lease. The lease ends after `ttl` unless it is renewed.
    ///
    /// # Errors
    /// Fails if etcd granted no lease.
    pub async fn grant(&mut self, ttl: Duration) -> Result<Lease, EtcdError> {
        let answer = self
            .call("lease/grant", json!({"TTL": ttl.as_secs()}))
            .await?;
        let id = answer["ID"].as_str().map(str::to_owned);
        id.map(Lease).ok_or_else(|| unexpected(&answer))
    }

    /// Renews a lease.
    ///
    /// # Errors
    /// Fails if the lease has run out, or if no address answers.
    pub async fn renew(&mut self, lease: &Lease) -> Result<(), EtcdError> {
        let answer = self.call("lease/keepalive", json!({"ID": lease.0})).await?;
        // The field is absent or zero if etcd does not know the lease.
        let ttl = answer["result"]["TTL"].as_str().unwrap_or("0");
        if ttl == "0" {
            Err(EtcdError::LeaseLost)
        } else {
            Ok(())
        }
    }

    /// Revokes a lease. etcd deletes the keys of the lease.
    ///
    /// # Errors
    /// Fails if etcd did not confirm. The lease then expires after its time.
    pub async fn revoke(&mut self, lease: &Lease) -> Result<(), EtcdError> {
        self.call("lease/revoke", json!({"ID": lease.0}))
            .await
            .map(drop)
    }

    /// Returns the value of a key; `None` if the key does not exist or the value is not text.
    ///
    /// # Errors
    /// Fails if the key cannot be read.
    pub async fn find(&mut self, key: &str) -> Result<Option<String>, EtcdError> {
        let answer = self.call("kv/range", json!({"key": b64(key)})).await?;
        Ok(answer["kvs"][0]["value"].as_str().and_then(plain))
    }

    /// Writes a key under a lease.
    ///
    /// # Errors
    /// Fails if etcd did not confirm the write.
    pub async fn put(&mut self, lease: &Lease, key: &str, value: &str) -> Result<(), EtcdError> {
        let body = json!({"key": b64(key), "value": b64(value), "lease": lease.0});
        self.call("kv/put", body).await.map(drop)
    }

    /// Deletes a key.
    ///
    /// # Errors
    /// Fails if etcd did not confirm the deletion.
    pub async fn delete(&mut self, key: &str) -> Result<(), EtcdError> {
        self.call("kv/deleterange", json!({"key": b64(key)}))
            .await
            .map(drop)
    }

    /// Returns every key that begins with `prefix`, and its value.
    ///
    /// # Errors
    /// Fails if the keys cannot be read.
    pub async fn list(&mut self, prefix: &str) -> Result<Vec<(String, String)>, EtcdError> {
        let body = json!({"key": b64(prefix), "range_end": b64(&after(prefix)), "limit": MAX_KEYS});
        let answer = self.call("kv/range", body).await?;
        let Some(all) = answer.get("kvs") else {
            return Ok(Vec::new());
        };
        let pairs = all.as_array().ok_or_else(|| unexpected(&answer))?;
        let text = |pair: &Value, name: &str| plain(pair[name].as_str().unwrap_or_default());
        Ok(pairs
            .iter()
            .filter_map(|pair| Some((text(pair, "key")?, text(pair, "value")?)))
            .collect())
    }

    /// Watches every key that begins with `prefix`.
    ///
    /// # Errors
    /// Fails if the address does not answer, or if it refuses the watch.
    pub async fn watch(&mut self, prefix: &str) -> Result<Watch<C::Body>, EtcdError> {
        let range = json!({"key": b64(prefix), "range_end": b64(&after(prefix))});
        let body = json!({"create_request": range}).to_string();
        let url = format!("{}/v3/watch", self.urls[self.at]);
        let unreachable = |cause: String| EtcdError::Unreachable {
            url: url.clone(),
            cause,
        };
        let opened = timeout(ANSWER_TIMEOUT, self.client.post(&url, body.into())).await;
        let response = opened
            .map_err(|_| unreachable("no answer in time".to_owned()))?
            .map_err(|e| unreachable(e.to_string()))?;
        let status = response.status();
        if !status.is_success() {
            let text = "the watch is refused".to_owned();
            return Err(EtcdError::Failed { status, text });
        }
        Ok(Watch {
            body: response.into_body(),
            partial: Vec::new(),
        })
    }

    /// Calls a method at the address that answered last. If the call fails, calls the method at the
    /// other addresses until a call succeeds.
    async fn call(&mut self, method: &str, body: Value) -> Result<Value, EtcdError> {
        let body = Bytes::from(body.to_string());
        let mut error = EtcdError::NoAddress;
        for _ in 0..self.urls.len() {
            let url = format!("{}/v3/{method}", self.urls[self.at]);
            match self.post(&url, body.clone()).await {
                Ok((status, answer)) if status.is_success() => {
                    return serde_json::from_slice(&answer)
                        .map_err(|e| EtcdError::Unexpected(e.to_string()));
                }
                Ok((status, answer)) => {
                    let text: String = String::from_utf8_lossy(&answer).chars().take(200).collect();
                    error = EtcdError::Failed { status, text };
                }
                Err(cause) => error = EtcdError::Unreachable { url, cause },
            }
            self.at = (self.at + 1) % self.urls.len();
        }
        Err(error)
    }

    /// Posts JSON and returns the status and the whole body of the answer.
    async fn post(&self, url: &str, body: Bytes) -> Result<(StatusCode, Bytes), String> {
        let answer = async {
            let response = self.client.post(url, body).await;
            let (head, body) = response.map_err(|e| e.to_string())?.into_parts();
            let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
            let body = body.map_err(|e| format!("connection lost: {e}"))?;
            Ok((head.status, body.to_bytes()))
        };
        timeout(ANSWER_TIMEOUT, answer)
            .await
            .map_err(|_| format!("no answer within {ANSWER_TIMEOUT:?}"))?
    }
}

impl<B: Body<Data = Bytes> + Unpin> Watch<B> {
    /// Waits until a key has changed. Returns false if the watch has ended.
    ///
    /// # Cancel safety
    /// No event is lost when the future is dropped.
    pub async fn changed(&mut self) -> bool {
        loop {
            while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).unwrap_or_default();
                // The first answer confirms the watch and carries no events.
                if event["result"]["events"].is_array() {
                    return true;
                }
            }
            let Some(Ok(frame)) = self.body.frame().await else {
                return false;
            };
            self.partial
                .extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            if self.partial.len() > MAX_EVENT_BYTES {
                return false;
            }
        }
    }
}

fn unexpected(answer: &Value) -> EtcdError {
    EtcdError::Unexpected(answer.to_string().chars().take(200).collect())
}

/// Returns the first key after all keys that begin with `prefix`. The prefix ends with a slash, and `0`
/// is the character after the slash.
fn after(prefix: &str) -> String {
    format!("{}0", prefix.strip_suffix('/').unwrap_or(prefix))
}

fn b64(text: &str) -> String {
    STANDARD.encode(text)
}

fn plain(text: &str) -> Option<String> {
    String::from_utf8(STANDARD.decode(text).ok()?).ok()
}

/// Longest time that the client waits for an answer. etcd answers within milliseconds, or after about a second while
/// it elects a leader.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum length of an answer in bytes. An instance of the registry takes less than 1 KiB.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// Maximum number of keys in a list. Each proxy writes one key per instance.
const MAX_KEYS: usize = 4096;
/// Maximum length of an event in bytes. An event carries one value.
const MAX_EVENT_BYTES: usize = 1024 * 1024;
