//! An HTTP client for requests with a short answer.

use bytes::Bytes;
use common::etcd::Post;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::StoreError;

/// A client that reads at most [`MAX_BYTES`] of each answer. For etcd, `common::etcd` limits the length of answers.
#[derive(Clone, Debug)]
pub(crate) struct Http(Client<HttpConnector, Full<Bytes>>);

impl Default for Http {
    fn default() -> Self {
        Self(Client::builder(TokioExecutor::new()).build_http())
    }
}

impl Http {
    pub(crate) async fn get(&self, url: &str) -> Result<(u16, Vec<u8>), StoreError> {
        self.send(Method::GET, url, Vec::new()).await
    }

    pub(crate) async fn put(&self, url: &str, body: Vec<u8>) -> Result<u16, StoreError> {
        self.send(Method::PUT, url, body)
            .await
            .map(|answer| answer.0)
    }

    /// Sends a request and returns the status and the body of the answer.
    async fn send(
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

impl Post for Http {
    type Body = Incoming;
    type Error = String;

    async fn post(&self, url: &str, body: Bytes) -> Result<Response<Incoming>, String> {
        let request = Request::post(url).body(Full::new(body));
        let answer = self.0.request(request.map_err(|e| e.to_string())?).await;
        answer.map_err(|e| e.to_string())
    }
}

/// Maximum length of an answer's body in bytes. A correct answer is one address. The limit protects
/// the memory of this process if the URL leads to a wrong server.
const MAX_BYTES: usize = 64 * 1024;
