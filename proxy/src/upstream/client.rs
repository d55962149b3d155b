//! The HTTP requests that the proxy sends: both legs of a request, and call-backs.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use common::etcd::Post;
use http::header::{self, HeaderMap};
use http::{Method, Request, Response, StatusCode, response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::connect::HttpConnector;
use tokio::time::{Instant, timeout, timeout_at};

use crate::connectors::Handoff;
use crate::connectors::answer::read;
use crate::openai::fallback::Fallback;
use crate::openai::headers::{JSON, is_event_stream};
use crate::openai::sse::First;
use crate::upstream::pool::{LinkBody, LinkError, Pool, with_cause};

mod answer;

use crate::fleet::zone::Resolver;
use crate::upstream::tls::{TlsError, TlsFiles};
pub(crate) use answer::{Answer, LegError, LegFailure, PrefillEnd};

/// Sends requests to engines and sidecars.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pool: Arc<Pool>,
    /// Longest wait for the next bytes of an answer that the proxy holds back.
    idle_timeout: Duration,
}

impl Client {
    /// Creates a client that trusts the roots of `tls`, with these timeouts.
    ///
    /// # Errors
    /// TLS cannot be set up.
    pub(crate) fn new(
        tls: &TlsFiles,
        connect_timeout: Duration,
        idle_timeout: Duration,
    ) -> Result<Self, TlsError> {
        let mut connector = HttpConnector::new_with_resolver(Resolver);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(connect_timeout));
        connector.enforce_http(false);
        // A host that loses its power or network closes no connection. Without keep-alive probes, the
        // proxy would wait for an answer until the deadline of the answer.
        connector.set_keepalive(Some(KEEPALIVE));
        connector.set_keepalive_interval(Some(KEEPALIVE));
        connector.set_keepalive_retries(Some(KEEPALIVE_RETRIES));
        Ok(Self {
            pool: Arc::new(Pool::new(tls.connector(connector)?)),
            idle_timeout,
        })
    }

    /// Sends a prefill leg and reads its answer.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection, so that the engine aborts the request.
    pub(crate) async fn prefill(
        &self,
        url: &str,
        headers: HeaderMap,
        body: Bytes,
        handoff: &dyn Handoff,
    ) -> PrefillEnd {
        let response = match self.send(Method::POST, url, headers, body).await {
            Ok(response) => response,
            Err(e) => return PrefillEnd::Failed(Fallback::PrefillDied, e.to_string()),
        };
        let status = response.status();
        let (head, rest) = response.into_parts();
        let body = match Limited::new(rest, MAX_PREFILL_ANSWER).collect().await {
            Ok(body) => body.to_bytes(),
            // The status shows that the prefill is done. If the hand-off also needs the body, the call of
            // `read` below returns an error.
            Err(_) if status.is_success() => Bytes::new(),
            Err(e) => return PrefillEnd::Failed(Fallback::PrefillDied, e.to_string()),
        };
        if status.is_success() {
            return match read(handoff, &body) {
                Ok(prefilled) => PrefillEnd::Answered(prefilled),
                Err(none) => PrefillEnd::Failed(none.fallback, none.text),
            };
        }
        let text = format!("{status}: {}", shown(&body));
        match status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                PrefillEnd::Failed(Fallback::PrefillBusy, text)
            }
            StatusCode::REQUEST_TIMEOUT => PrefillEnd::Failed(Fallback::PrefillError, text),
            status if status.is_client_error() => PrefillEnd::Refused(Box::new(Answer {
                head,
                held: body,
                rest: None,
            })),
            _ => PrefillEnd::Failed(Fallback::PrefillError, text),
        }
    }

    /// Posts a request that prepares a prefill leg, and reads its answer, which may contain the prompt's
    /// token ids.
    ///
    /// # Errors
    /// There was no answer, or it was too long.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection.
    pub(crate) async fn ask(
        &self,
        url: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Answer, LegError> {
        let response = self.send(Method::POST, url, headers, body).await?;
        whole(response, MAX_HELD).await
    }

    /// Sends a decode leg, or any other request to one instance. Waits up to `limit` for the first event of the
    /// answer, or for the whole answer if the answer is short and not streamed. Before the first event has
    /// come, another instance can take over, and the client does not notice.
    ///
    /// # Errors
    /// There was no answer, or its status says that another instance may have a better answer.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection, so that the engine aborts the request.
    pub(crate) async fn decode(
        &self,
        method: Method,
        url: &str,
        headers: HeaderMap,
        body: Bytes,
        limit: Duration,
    ) -> Result<Answer, LegError> {
        let deadline = Instant::now() + limit;
        let late = || LegError::Timeout(limit);
        let response = timeout_at(deadline, self.send(method, url, headers, body))
            .await
            .map_err(|_| late())??;
        let (head, mut rest) = response.into_parts();
        let is_stream = is_event_stream(&head.headers);
        let first = async {
            if is_stream {
                first_event(&mut rest).await.map(Some)
            } else {
                next_data(&mut rest).await
            }
        };
        let first = timeout_at(deadline, first).await.map_err(|_| late())??;
        let answer = match first {
            Some(first) if is_stream => Answer::of_first_event(head, first, rest),
            Some(first) => self.hold(head, first, rest).await?,
            None => Answer {
                head,
                held: Bytes::new(),
                rest: None,
            },
        };
        answer.judged()
    }

    /// Returns the connections, for requests that need a connection of their own.
    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Sends a GET request and reads a short answer.
    ///
    /// # Errors
    /// There was no answer within `limit`, or it was too long.
    pub(crate) async fn get(
        &self,
        url: &str,
        headers: HeaderMap,
        limit: Duration,
    ) -> Result<Answer, LegError> {
        let answer = async {
            let response = self.send(Method::GET, url, headers, Bytes::new()).await?;
            whole(response, MAX_SHORT_ANSWER).await
        };
        timeout(limit, answer)
            .await
            .map_err(|_| LegError::Timeout(limit))?
    }

    /// Posts JSON and reads a short answer.
    ///
    /// # Errors
    /// There was no answer within `limit`, or it was too long.
    pub(crate) async fn post_json(
        &self,
        url: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), LegError> {
        timeout(limit, async {
            let response = self.post(url, body).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_SHORT_ANSWER)
                .collect()
                .await
                .map_err(|e| LegError::Died(e.to_string()))?;
            Ok((status, body.to_bytes()))
        })
        .await
        .map_err(|_| LegError::Timeout(limit))?
    }

    /// Reads the body of an answer that is not streamed, up to [`MAX_HELD`] bytes.
    async fn hold(
        &self,
        head: response::Parts,
        first: Bytes,
        mut rest: LinkBody,
    ) -> Result<Answer, LegError> {
        let mut held = BytesMut::from(&first[..]);
        while held.len() < MAX_HELD {
            let next = timeout(self.idle_timeout, next_data(&mut rest))
                .await
                .map_err(|_| LegError::Timeout(self.idle_timeout))??;
            let Some(next) = next else {
                return Ok(Answer {
                    head,
                    held: held.freeze(),
                    rest: None,
                });
            };
            held.extend_from_slice(&next);
        }
        Ok(Answer {
            head,
            held: held.freeze(),
            rest: Some(rest),
        })
    }

    /// Sends a request and returns when the head of the answer has come. A redirect is an error.
    async fn send(
        &self,
        method: Method,
        url: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Response<LinkBody>, LegError> {
        let mut request = Request::builder()
            .method(method)
            .uri(url)
            .body(Full::new(body))
            .map_err(|e| LegError::Connect(e.to_string()))?;
        *request.headers_mut() = headers;
        let answer = self.pool.request(request).await.map_err(|e| match e {
            LinkError::Connect(text) => LegError::Connect(text),
            LinkError::Lost(text) => LegError::Died(text),
        })?;
        let status = answer.status();
        if status.is_redirection() {
            // Engines do not redirect. A redirect could lead to a host that was not configured.
            return Err(LegError::Died(format!("it answered {status}")));
        }
        Ok(answer)
    }
}

impl Post for Client {
    type Body = LinkBody;
    type Error = LegError;

    async fn post(&self, url: &str, body: Bytes) -> Result<Response<LinkBody>, LegError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, JSON);
        self.send(Method::POST, url, headers, body).await
    }
}

/// Reads the rest of an answer and returns the whole answer.
///
/// # Errors
/// The connection ended before the answer was complete, or the answer has more than `limit` bytes.
async fn whole(response: Response<LinkBody>, limit: usize) -> Result<Answer, LegError> {
    let (head, rest) = response.into_parts();
    let held = Limited::new(rest, limit)
        .collect()
        .await
        .map_err(|e| LegError::Died(e.to_string()))?
        .to_bytes();
    Ok(Answer {
        head,
        held,
        rest: None,
    })
}

/// Returns the next bytes of a body; `None` at its end.
async fn next_data(body: &mut LinkBody) -> Result<Option<Bytes>, LegError> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| LegError::Died(with_cause(&e)))?;
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
        {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

/// Reads a stream up to its first event with data. Comments before this event are dropped.
async fn first_event(body: &mut LinkBody) -> Result<Bytes, LegError> {
    let mut first = First::default();
    while let Some(chunk) = next_data(body).await? {
        if let Some(event) = first.take(&chunk) {
            return Ok(event.into());
        }
    }
    Err(LegError::Died("its stream ended without an event".into()))
}

/// Returns the beginning of an engine's error, for logs.
fn shown(body: &Bytes) -> String {
    String::from_utf8_lossy(body)
        .chars()
        .take(SHOWN_CHARS)
        .collect()
}

/// Longest answer of a prefill leg in bytes. An answer with one token has less than 1 KiB without logprobs;
/// with logprobs it is longer.
const MAX_PREFILL_ANSWER: usize = 1024 * 1024;

/// Longest short answer in bytes. A call-back's answer is one small object; a list of models with
/// adapters can be longer.
const MAX_SHORT_ANSWER: usize = 1024 * 1024;

/// Maximum number of bytes that the proxy holds back if an answer is not streamed. If the engine dies before
/// the proxy forwards these bytes, another engine can take over, or the client gets an error.
const MAX_HELD: usize = 4 * 1024 * 1024;

/// Time without data before the first keep-alive probe, and between probes. If the host does not answer,
/// the connection ends after 40 s.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;

/// Maximum number of characters of an engine's error that logs show.
const SHOWN_CHARS: usize = 300;
