//! The admin server: health, readiness, metrics, the proxy's call-back, the last requests.
//!
//! The server is for the operator and the operator's programs, and listens on a loopback port unless
//! configured otherwise. [`http_server`] has the limits of connections and requests.

mod pages;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::{CONTENT_TYPE, ORIGIN};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use common::http_server;
use protocol::Epoch;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::HostPort;
use crate::observe::metrics::{self, Metrics};
use crate::observe::status::{NotReady, Status};

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
    readers: Readers,
}

/// The clients that may read the pages about peers and requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Readers {
    /// Clients of all hosts.
    AllHosts,
    /// Clients of this host. The pages show ids of requests and addresses of peers, and a client of another host proves no
    /// key.
    ThisHost,
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
        readers: Readers,
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
            router: router(Shared {
                status,
                metrics,
                readers,
            }),
        })
    }

    /// Returns the port that was bound.
    pub(crate) fn port(&self) -> u16 {
        self.local.port()
    }

    /// Serves until `stop` is cancelled.
    pub(crate) async fn run(self, stop: CancellationToken) {
        http_server::run(self.listener, self.router, stop).await;
    }
}

fn router(shared: Shared) -> Router {
    let shown = Router::new()
        .route("/requests", get(requests))
        .route("/status", get(status))
        .route_layer(axum::middleware::from_fn_with_state(
            shared.readers,
            pages::refuse,
        ));
    Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(exposition))
        .route("/registered", post(registered))
        .merge(shown)
        .fallback(unknown)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
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
    let obstacles = shared.status.obstacles(now);
    // With keys the proxy confirms the registration only after this answer, so a missing confirmation is no reason here.
    let reasons: Vec<_> = obstacles
        .iter()
        .filter(|obstacle| !matches!(obstacle, NotReady::NoProxy(..)))
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

/// Largest body. A call-back has about 100 bytes.
const MAX_BODY_BYTES: usize = 16 << 10;
const MAX_NAME_CHARS: usize = 256;

#[cfg(test)]
mod tests;
