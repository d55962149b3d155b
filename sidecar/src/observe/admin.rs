//! The admin server: health, readiness, metrics, the proxy's call-back, the last requests.
//!
//! The server is for the operator and the operator's programs, and listens on a loopback port unless
//! configured otherwise. The server also limits the number of connections, the size of heads and bodies, and
//! the time of each request.

mod pages;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::{CONTENT_TYPE, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use protocol::Epoch;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, info, warn};

use crate::config::HostPort;
use crate::observe::metrics::{self, Metrics};
use crate::observe::status::Status;

/// The server with its port bound.
#[derive(Debug)]
pub(crate) struct Admin {
    listener: TcpListener,
    local: SocketAddr,
    router: Router,
}

/// An admin port that cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("the admin port {address} cannot be bound; set sidecar.admin or --admin to another")]
pub(crate) struct BindError {
    address: String,
    source: io::Error,
}

#[derive(Clone, Debug)]
struct Shared {
    status: Arc<Status>,
    metrics: Arc<Metrics>,
}

/// The proxy's call-back.
#[derive(Debug, Deserialize)]
struct Registered {
    /// The name that the proxy gives itself.
    proxy: String,
    /// Name of the sidecar that the proxy wants to call.
    id: String,
    /// Epoch of that sidecar, which is new at each start of the process.
    epoch: Epoch,
}

/// The answer to the proxy's call-back.
#[derive(Debug, Serialize)]
struct Acknowledged {
    id: String,
    epoch: Epoch,
    ready: bool,
    /// The reasons why the sidecar is not ready; empty if ready.
    reason: String,
}

impl Admin {
    /// Binds the port; 0 means any free port.
    ///
    /// # Errors
    /// See [`BindError`].
    pub(crate) async fn bind(
        address: &HostPort,
        status: Arc<Status>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, BindError> {
        let failed = |source| BindError {
            address: address.to_string(),
            source,
        };
        let listener = TcpListener::bind((address.host.as_str(), address.port))
            .await
            .map_err(failed)?;
        let local = listener.local_addr().map_err(failed)?;
        info!(address = %local, "admin server bound");
        Ok(Self {
            listener,
            local,
            router: router(Shared { status, metrics }),
        })
    }

    /// Returns the port that was bound.
    pub(crate) fn port(&self) -> u16 {
        self.local.port()
    }

    /// Serves until `stop` is cancelled, and then waits up to [`LAST_WORDS`] for answers that are being
    /// written.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut connections = JoinSet::new();
        let mut open: VecDeque<(u64, CancellationToken)> = VecDeque::new();
        let mut evicted: u64 = 0;
        for number in 0.. {
            let stream = loop {
                tokio::select! {
                    biased;
                    () = stop.cancelled() => break None,
                    Some(ended) = connections.join_next() => {
                        if let Ok(ended) = ended {
                            open.retain(|(number, _)| *number != ended);
                        }
                    }
                    stream = accept(&self.listener) => break Some(stream),
                }
            };
            let Some(stream) = stream else {
                break;
            };
            // At the limit, the oldest connection is closed, so that a client that opens connections and
            // stays silent cannot lock out other clients.
            if open.len() >= MAX_CONNECTIONS
                && let Some((_, oldest)) = open.pop_front()
            {
                oldest.cancel();
                evicted += 1;
                if evicted.is_power_of_two() {
                    warn!(
                        limit = MAX_CONNECTIONS,
                        total = evicted,
                        "too many admin connections: closed the oldest"
                    );
                }
            }
            let evict = CancellationToken::new();
            open.push_back((number, evict.clone()));
            let serving = serve(stream, self.router.clone(), stop.clone(), evict);
            connections.spawn(async move {
                serving.await;
                number
            });
        }
        // New connections are refused from now on; only answers that are being written are still completed.
        drop(self.listener);
        let closed = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_WORDS, closed).await.is_err() {
            debug!("admin connections were still open at the end");
        }
        connections.shutdown().await;
    }
}

fn router(shared: Shared) -> Router {
    let shown = Router::new()
        .route("/requests", get(requests))
        .route("/status", get(status))
        .route_layer(axum::middleware::from_fn(pages::refuse));
    Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(exposition))
        .route("/registered", post(registered))
        .merge(shown)
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(axum::middleware::from_fn(bounded))
        .with_state(shared)
}

async fn health() -> Json<Value> {
    Json(json!({ "live": true }))
}

async fn ready(State(shared): State<Shared>) -> Response {
    let obstacles = shared.status.obstacles(Instant::now());
    let reasons: Vec<_> = obstacles.iter().map(ToString::to_string).collect();
    let code = if reasons.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = json!({ "ready": reasons.is_empty(), "reasons": reasons });
    (code, Json(body)).into_response()
}

async fn exposition(State(shared): State<Shared>) -> Response {
    (
        [(CONTENT_TYPE, metrics::CONTENT_TYPE)],
        shared.metrics.text(),
    )
        .into_response()
}

async fn requests(State(shared): State<Shared>) -> Response {
    Json(shared.status.requests(Instant::now())).into_response()
}

async fn status(State(shared): State<Shared>) -> Response {
    Json(shared.status.snapshot(Instant::now())).into_response()
}

async fn registered(
    State(shared): State<Shared>,
    headers: HeaderMap,
    body: Result<Json<Registered>, JsonRejection>,
) -> Response {
    // A browser adds `Origin` or `Sec-Fetch-Site` to each POST of a page, even after DNS rebinding. A proxy
    // adds neither header.
    if headers.contains_key(ORIGIN) || headers.contains_key("sec-fetch-site") {
        shared.metrics.malformed.count("admin");
        warn!("refused a call-back from a web page (header Origin or Sec-Fetch-Site)");
        return refused(
            StatusCode::FORBIDDEN,
            "only a proxy may send a call-back, not a web page",
        );
    }
    let call = match body {
        Ok(Json(call)) => call,
        Err(rejection) => {
            shared.metrics.malformed.count("admin");
            warn!(error = rejection.body_text(), "malformed call-back");
            return refused(rejection.status(), &rejection.body_text());
        }
    };
    let about = shared.status.about();
    if call.id != about.id || call.epoch != about.epoch {
        let text = format!(
            "this is {} in epoch {}, not {:.128} in epoch {}",
            about.id, about.epoch, call.id, call.epoch
        );
        warn!(proxy = call.proxy, "call-back for another sidecar: {text}");
        return refused(StatusCode::CONFLICT, &text);
    }
    let now = Instant::now();
    let name: String = call.proxy.chars().take(MAX_NAME_CHARS).collect();
    shared.status.acknowledged(&name, now);
    shared.metrics.proxy.acknowledged();
    let reasons: Vec<_> = shared
        .status
        .obstacles(now)
        .iter()
        .map(ToString::to_string)
        .collect();
    Json(Acknowledged {
        id: about.id.clone(),
        epoch: about.epoch,
        ready: reasons.is_empty(),
        reason: reasons.join("; "),
    })
    .into_response()
}

async fn unknown() -> Response {
    let text = "no such path; there are GET /health /ready /metrics /requests /status and POST /registered";
    refused(StatusCode::NOT_FOUND, text)
}

fn refused(code: StatusCode, text: &str) -> Response {
    (code, Json(json!({ "error": text }))).into_response()
}

/// Ends a request that takes too long, including the time to read its body.
async fn bounded(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => refused(StatusCode::REQUEST_TIMEOUT, "the request took too long"),
    }
}

/// Waits for the next connection.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                // If an accept fails, the process usually has no free file descriptor. A connection that ends
                // frees its descriptor, so the loop tries to accept again.
                warn!(%error, "cannot accept an admin connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(
    stream: TcpStream,
    router: Router,
    stop: CancellationToken,
    evict: CancellationToken,
) {
    let peer = stream.peer_addr().ok();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        let router = router.clone();
        if let Some(peer) = peer {
            request.extensions_mut().insert(peer);
        }
        async move {
            let response = router.oneshot(request.map(axum::body::Body::new)).await;
            Ok::<_, Infallible>(response.unwrap_or_else(|never| match never {}))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                debug!(%error, "admin connection ended");
            }
        }
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            // This wait ends when the answer in progress is written. `Admin::run` limits the time of the
            // wait.
            connection.as_mut().await.ok();
        }
        () = evict.cancelled() => {}
        () = tokio::time::sleep(CONNECTION_LIFETIME) => {}
    }
}

/// Maximum number of connections at the same time: scrapers, a proxy and a few people. If a further
/// connection comes, the oldest connection is closed, so that silent connections cannot lock out the proxy's
/// call-back, on which readiness depends.
const MAX_CONNECTIONS: usize = 64;
/// Largest body. A call-back has about 100 bytes.
const MAX_BODY_BYTES: usize = 16 << 10;
/// Largest head. hyper does not accept a limit below 8 KiB.
const MAX_HEAD_BYTES: usize = 16 << 10;
const MAX_NAME_CHARS: usize = 256;
/// Longest time until a request's head is complete, and longest silence of a connection between two requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time of a request. Answers come from memory, so only a slow body takes time.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest life of a connection. The limit ends the connection of a client that does not read its answer.
/// Scrapers connect again.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
const LAST_WORDS: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests;
