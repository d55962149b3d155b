//! Requests that turn their connection into a stream of bytes in both directions, as a WebSocket does.

use std::time::Duration;

use bytes::Bytes;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Method, Request, StatusCode, response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::handshake;
use hyper::upgrade::{self, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::upstream::client::{Answer, LegError};
use crate::upstream::pool::{LinkError, Pool, with_cause};

/// The engine's side of a connection that has changed its protocol.
pub(crate) type EngineStream = TokioIo<Upgraded>;

/// The answer of an engine to a request for another protocol.
#[derive(Debug)]
pub(crate) enum Switch {
    /// The engine has agreed. The stream carries the other protocol from now on.
    Agreed(response::Parts, EngineStream),
    /// The engine has refused; this is its answer.
    Refused(Box<Answer>),
}

/// Asks an engine for the protocol that `headers` name in `Upgrade`, over a connection of its own. Waits up to `limit`
/// for the answer.
///
/// # Errors
/// There was no answer, or its status says that another instance may have a better answer.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub(crate) async fn switch(
    pool: &Pool,
    url: &str,
    headers: HeaderMap,
    limit: Duration,
) -> Result<Switch, LegError> {
    timeout(limit, asked(pool, url, headers))
        .await
        .map_err(|_| LegError::Timeout(limit))?
}

async fn asked(pool: &Pool, url: &str, mut headers: HeaderMap) -> Result<Switch, LegError> {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    let mut request = Request::builder()
        .method(Method::GET)
        .uri(url)
        .body(Full::new(Bytes::new()))
        .map_err(|e| LegError::Connect(e.to_string()))?;
    *request.headers_mut() = headers;
    let died = |e: hyper::Error| LegError::Died(with_cause(&e));
    let stream = pool.connect(&mut request).await.map_err(|e| match e {
        LinkError::Connect(text) | LinkError::Lost(text) => LegError::Connect(text),
    })?;
    let (mut sender, wire) = handshake(stream).await.map_err(died)?;
    // The task ends when the connection has changed its protocol, or when the connection closes. An error of the
    // connection also reaches the request.
    let _wire = AbortOnDropHandle::new(tokio::spawn(wire.with_upgrades()));
    let mut answer = sender.send_request(request).await.map_err(died)?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        let stream = upgrade::on(&mut answer).await.map_err(died)?;
        return Ok(Switch::Agreed(answer.into_parts().0, TokioIo::new(stream)));
    }
    let (head, body) = answer.into_parts();
    let held = Limited::new(body, MAX_REFUSAL)
        .collect()
        .await
        .map_err(|e| LegError::Died(e.to_string()))?
        .to_bytes();
    let refused = Answer {
        head,
        held,
        rest: None,
    };
    Ok(Switch::Refused(Box::new(refused.judged()?)))
}

/// Longest refusal of an engine, in bytes: an error's text.
const MAX_REFUSAL: usize = 64 * 1024;
