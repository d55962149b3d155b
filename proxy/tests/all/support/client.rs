//! A scripted client of the proxy.

use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;
use tokio::time::timeout;

#[derive(Clone)]
pub struct Client {
    http: Http<HttpConnector, Full<Bytes>>,
    pub base: String,
}

/// An answer that was read to its end.
#[derive(Debug)]
pub struct Whole {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// True if the body ended properly, according to its framing.
    pub complete: bool,
}

/// An answer that is being streamed.
pub struct Streamed {
    pub status: StatusCode,
    pub headers: HeaderMap,
    body: Incoming,
}

impl Client {
    pub fn new(base: String) -> Self {
        Self {
            http: Http::builder(TokioExecutor::new()).build_http(),
            base,
        }
    }

    pub async fn get(&self, path: &str) -> Whole {
        self.open(Method::GET, path, &[], Bytes::new())
            .await
            .whole()
            .await
    }

    pub async fn delete(&self, path: &str) -> Whole {
        self.open(Method::DELETE, path, &[], Bytes::new())
            .await
            .whole()
            .await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Whole {
        self.post_with(path, &[], body.to_string()).await
    }

    pub async fn post_with(
        &self,
        path: &str,
        headers: &[(&'static str, &str)],
        body: impl Into<Bytes>,
    ) -> Whole {
        self.open(Method::POST, path, headers, body.into())
            .await
            .whole()
            .await
    }

    /// Sends a request and waits for the head of its answer.
    pub async fn stream(&self, path: &str, body: &Value) -> Streamed {
        self.open(Method::POST, path, &[], body.to_string().into())
            .await
    }

    pub async fn open(
        &self,
        method: Method,
        path: &str,
        headers: &[(&'static str, &str)],
        body: Bytes,
    ) -> Streamed {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let is_typed = headers.iter().any(|(name, _)| *name == "content-type");
        if !body.is_empty() && !is_typed {
            request = request.header("content-type", "application/json");
        }
        let request = request.body(Full::new(body)).unwrap();
        let response = timeout(super::PATIENCE, self.http.request(request))
            .await
            .expect("an answer in time")
            .expect("an answer");
        let (head, body) = response.into_parts();
        Streamed {
            status: head.status,
            headers: head.headers,
            body,
        }
    }
}

impl Streamed {
    /// Returns the next chunk, `None` at the end, or an error text if the stream breaks.
    pub async fn chunk(&mut self) -> Option<Result<String, String>> {
        let frame = timeout(super::PATIENCE, self.body.frame())
            .await
            .expect("a chunk in time")?;
        Some(match frame {
            Ok(frame) => Ok(String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()),
            Err(e) => Err(e.to_string()),
        })
    }

    pub async fn whole(mut self) -> Whole {
        let mut body = Vec::new();
        let mut complete = true;
        while let Some(chunk) = self.chunk().await {
            match chunk {
                Ok(chunk) => body.extend_from_slice(chunk.as_bytes()),
                Err(_) => complete = false,
            }
        }
        Whole {
            status: self.status,
            headers: self.headers,
            body: body.into(),
            complete,
        }
    }
}

impl Whole {
    pub fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }

    pub fn error_code(&self) -> String {
        self.json()["error"]["code"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    }
}
