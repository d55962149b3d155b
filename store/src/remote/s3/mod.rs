//! Object stores with Amazon's S3 protocol.

mod http;

use std::fmt;
use std::time::Duration;

use ::http::Uri;
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{BackoffConfig, Error, ObjectStoreExt as _, PutPayload, RetryConfig};

use super::Settings;
use super::backend::{Backend, BackendError};

/// A bucket.
pub(super) struct S3(AmazonS3);

impl S3 {
    pub(super) fn new(bucket: &str, settings: &Settings) -> Result<Self, String> {
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(50),
                max_backoff: settings.timeout,
                base: 2.0,
            },
            // An object store answers a few requests of a thousand with 500 or 503, which a second try cures.
            max_retries: 2,
            retry_timeout: settings.timeout,
        };
        // Amazon's own environment variables, such as the roles of Kubernetes and of an instance.
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_retry(retry)
            .with_http_connector(http::Connector::new()?);
        let credentials = &settings.credentials;
        if let (Some(id), Some(key)) = (&credentials.access_key_id, &credentials.secret_access_key)
        {
            builder = builder.with_access_key_id(id).with_secret_access_key(key);
        }
        if let Some(token) = &credentials.session_token {
            builder = builder.with_token(token);
        }
        if let Some(region) = &settings.region {
            builder = builder.with_region(region);
        }
        if let Some(endpoint) = &settings.endpoint {
            let plain = is_plain(endpoint)?;
            builder = builder.with_endpoint(endpoint).with_allow_http(plain);
        }
        builder
            .build()
            .map(Self)
            .map_err(|error| format!("--remote s3://{bucket}: {}", BackendError::new(&error)))
    }
}

impl Backend for S3 {
    fn get<'a>(
        &'a self,
        name: &'a str,
        most: usize,
    ) -> BoxFuture<'a, Result<Option<Bytes>, BackendError>> {
        async move {
            let found = match self.0.get(&Path::from(name)).await {
                Ok(found) => found,
                Err(Error::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(BackendError::new(&error)),
            };
            if found.meta.size > most as u64 {
                // An empty value is no value of a store, so the caller counts it as damaged.
                return Ok(Some(Bytes::new()));
            }
            let value = found.bytes().await;
            value.map(Some).map_err(|error| BackendError::new(&error))
        }
        .boxed()
    }

    /// Puts a value. An object store forgets nothing by itself: `life` is not used, and a rule of the bucket deletes old
    /// objects.
    fn put<'a>(
        &'a self,
        name: &'a str,
        parts: [Bytes; 2],
        _life: Option<Duration>,
    ) -> BoxFuture<'a, Result<(), BackendError>> {
        async move {
            let payload = PutPayload::from_iter(parts);
            let put = self.0.put(&Path::from(name), payload).await;
            put.map(|_| ()).map_err(|error| BackendError::new(&error))
        }
        .boxed()
    }
}

impl fmt::Debug for S3 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The library's own form may contain the key.
        f.write_str("S3")
    }
}

/// Returns true if the endpoint is without TLS.
fn is_plain(endpoint: &str) -> Result<bool, String> {
    let wrong =
        || format!("--remote-endpoint {endpoint:?} must be http://HOST:PORT or https://HOST:PORT");
    let uri: Uri = endpoint.parse().map_err(|_| wrong())?;
    let has_secret = uri.authority().is_some_and(|a| a.as_str().contains('@'));
    match uri.scheme_str() {
        // The text is not repeated, because it has a secret.
        _ if has_secret => Err(
            "--remote-endpoint has a user or a password: write them into the file of \
                                --remote-credentials"
                .to_owned(),
        ),
        Some("http") => Ok(true),
        Some("https") => Ok(false),
        _ => Err(wrong()),
    }
}
