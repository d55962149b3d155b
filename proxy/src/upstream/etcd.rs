//! etcd's key-value API, as far as a registry needs it: leases, keys under them, a watch.
//!
//! Spoken through etcd's own JSON gateway (`/v3/...`), which every etcd since 3.4 serves at its client
//! port: a gRPC client would bring a second HTTP stack and a protocol compiler for five calls.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::upstream::client::Client;
use crate::upstream::pool::LinkBody;

/// One etcd, at any of its addresses.
#[derive(Debug)]
pub(crate) struct Etcd {
    client: Client,
    urls: Vec<String>,
    /// The address that answered last.
    at: usize,
}

/// A lease: keys under it vanish when it is not renewed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lease(String);

/// etcd did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EtcdError {
    /// No address answers.
    #[error("etcd: {0}")]
    Unreachable(String),
    /// It answered something else than expected.
    #[error("etcd answered {0}")]
    Unexpected(String),
    /// The lease has run out.
    #[error("the lease has run out")]
    LeaseLost,
}

/// A watch: each event is only a reason to read again.
#[derive(Debug)]
pub(crate) struct Watch {
    body: LinkBody,
    partial: Vec<u8>,
}

impl Etcd {
    /// An etcd that answers at these base URLs.
    pub(crate) fn new(client: Client, urls: Vec<String>) -> Self {
        Self {
            client,
            urls,
            at: 0,
        }
    }

    /// Takes a lease that lasts so long without being renewed.
    ///
    /// # Errors
    /// No lease.
    pub(crate) async fn grant(&mut self, ttl: Duration) -> Result<Lease, EtcdError> {
        let answer = self
            .call("lease/grant", json!({"TTL": ttl.as_secs()}))
            .await?;
        let id = answer["ID"].as_str().map(str::to_owned);
        id.map(Lease).ok_or_else(|| unexpected(&answer))
    }

    /// Renews it.
    ///
    /// # Errors
    /// It has run out, or nobody answers.
    pub(crate) async fn renew(&mut self, lease: &Lease) -> Result<(), EtcdError> {
        let answer = self.call("lease/keepalive", json!({"ID": lease.0})).await?;
        // Without a lease to renew, the field is absent or zero.
        let ttl = answer["result"]["TTL"].as_str().unwrap_or("0");
        if ttl == "0" {
            Err(EtcdError::LeaseLost)
        } else {
            Ok(())
        }
    }

    /// Gives it back, and its keys with it.
    ///
    /// # Errors
    /// It runs out by itself then.
    pub(crate) async fn revoke(&mut self, lease: &Lease) -> Result<(), EtcdError> {
        self.call("lease/revoke", json!({"ID": lease.0}))
            .await
            .map(drop)
    }

    /// Writes a key under a lease.
    ///
    /// # Errors
    /// It is not written, as far as is known.
    pub(crate) async fn put(
        &mut self,
        lease: &Lease,
        key: &str,
        value: &str,
    ) -> Result<(), EtcdError> {
        let body = json!({"key": b64(key), "value": b64(value), "lease": lease.0});
        self.call("kv/put", body).await.map(drop)
    }

    /// Deletes a key.
    ///
    /// # Errors
    /// It is not deleted, as far as is known.
    pub(crate) async fn delete(&mut self, key: &str) -> Result<(), EtcdError> {
        self.call("kv/deleterange", json!({"key": b64(key)}))
            .await
            .map(drop)
    }

    /// Every key that begins with `prefix`, and its value.
    ///
    /// # Errors
    /// They cannot be read.
    pub(crate) async fn list(&mut self, prefix: &str) -> Result<Vec<(String, String)>, EtcdError> {
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
    /// Nobody answers.
    pub(crate) async fn watch(&mut self, prefix: &str) -> Result<Watch, EtcdError> {
        let range = json!({"key": b64(prefix), "range_end": b64(&after(prefix))});
        let body = json!({"create_request": range}).to_string();
        let url = format!("{}/v3/watch", self.urls[self.at]);
        let opened = timeout(ANSWER_TIMEOUT, self.client.open(&url, body.into())).await;
        let response = opened
            .map_err(|_| EtcdError::Unreachable(format!("{url}: no answer in time")))?
            .map_err(|e| EtcdError::Unreachable(format!("{url}: {e}")))?;
        if !response.status().is_success() {
            return Err(EtcdError::Unexpected(response.status().to_string()));
        }
        Ok(Watch {
            body: response.into_body(),
            partial: Vec::new(),
        })
    }

    /// Asks the address that answered last, then the others.
    async fn call(&mut self, method: &str, body: Value) -> Result<Value, EtcdError> {
        let body = Bytes::from(body.to_string());
        let mut error = EtcdError::Unreachable("no address".into());
        for _ in 0..self.urls.len() {
            let url = format!("{}/v3/{method}", self.urls[self.at]);
            match self
                .client
                .post_json(&url, body.clone(), ANSWER_TIMEOUT)
                .await
            {
                Ok((status, answer)) if status.is_success() => {
                    return serde_json::from_slice(&answer)
                        .map_err(|e| EtcdError::Unexpected(e.to_string()));
                }
                Ok((status, answer)) => {
                    let text: String = String::from_utf8_lossy(&answer).chars().take(200).collect();
                    error = EtcdError::Unexpected(format!("{status}: {text}"));
                }
                Err(e) => error = EtcdError::Unreachable(format!("{url}: {e}")),
            }
            self.at = (self.at + 1) % self.urls.len();
        }
        Err(error)
    }
}

impl Watch {
    /// Waits until something has changed; `false` if the watch has ended.
    ///
    /// # Cancel safety
    /// No event is lost when the future is dropped.
    pub(crate) async fn changed(&mut self) -> bool {
        loop {
            while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                let event: Value = serde_json::from_slice(&line).unwrap_or_default();
                // The first answer says only that the watch is there.
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

/// The key after all that begin with `prefix`, which ends with a slash: the next character.
fn after(prefix: &str) -> String {
    format!("{}0", prefix.strip_suffix('/').unwrap_or(prefix))
}

fn b64(text: &str) -> String {
    STANDARD.encode(text)
}

fn plain(text: &str) -> Option<String> {
    String::from_utf8(STANDARD.decode(text).ok()?).ok()
}

/// etcd answers within milliseconds, or is electing a leader, which takes about a second.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Each proxy writes one key for each instance.
const MAX_KEYS: usize = 4096;
/// An event carries one value.
const MAX_EVENT_BYTES: usize = 1024 * 1024;
