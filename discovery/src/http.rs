//! One HTTP request at a time.

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::StoreError;

/// A client for short answers.
#[derive(Clone, Debug)]
pub(crate) struct Http(Client<HttpConnector, Full<Bytes>>);

impl Default for Http {
    fn default() -> Self {
        Self(Client::builder(TokioExecutor::new()).build_http())
    }
}

impl Http {
    pub(crate) async fn get(&self, url: &str) -> Result<(u16, Vec<u8>), StoreError> {
        self.ask(Method::GET, url, Vec::new()).await
    }

    pub(crate) async fn put(&self, url: &str, body: Vec<u8>) -> Result<u16, StoreError> {
        self.ask(Method::PUT, url, body)
            .await
            .map(|answer| answer.0)
    }

    pub(crate) async fn post(
        &self,
        url: &str,
        body: Vec<u8>,
    ) -> Result<(u16, Vec<u8>), StoreError> {
        self.ask(Method::POST, url, body).await
    }

    async fn ask(
        &self,
        method: Method,
        url: &str,
        body: Vec<u8>,
    ) -> Result<(u16, Vec<u8>), StoreError> {
        let failed = |why: String| StoreError::Unreachable {
            server: url.to_owned(),
            why,
        };
        let request = Request::builder()
            .method(method)
            .uri(url)
            .body(Full::from(body))
            .map_err(|e| failed(e.to_string()))?;
        let answer = self.0.request(request).await;
        let answer = answer.map_err(|e| failed(e.to_string()))?;
        let status = answer.status().as_u16();
        let body = Limited::new(answer.into_body(), MAX_BYTES).collect().await;
        let body = body.map_err(|e| failed(e.to_string()))?;
        Ok((status, body.to_bytes().to_vec()))
    }
}

/// An answer holds one address.
const MAX_BYTES: usize = 64 * 1024;
