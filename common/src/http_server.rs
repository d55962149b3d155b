//! A small HTTP server for operators and their programs: health probes, metrics, a few pages. It limits the number of
//! connections, the size of heads and the time of each request.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::extract::Request;
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::accept::{self, Change, Limits};

/// This server's address of a connection. Each request has it as an extension, beside the client's `SocketAddr`.
#[derive(Clone, Copy, Debug)]
pub struct OwnAddress(pub IpAddr);

/// Serves until `stop` is cancelled, and then waits up to [`LAST_WORDS`] for answers that are being written.
pub async fn run(listener: TcpListener, router: Router, stop: CancellationToken) {
    let router = router.layer(axum::middleware::from_fn(bounded));
    let limits = Limits {
        connections: MAX_CONNECTIONS,
        grace: LAST_WORDS,
    };
    let mut evicted: u64 = 0;
    let changed = |change| {
        if change == Change::Evicted {
            evicted += 1;
            if evicted.is_power_of_two() {
                warn!(
                    limit = MAX_CONNECTIONS,
                    total = evicted,
                    "too many HTTP connections: closed the oldest"
                );
            }
        }
    };
    let ending = stop.clone();
    accept::run(listener, limits, stop, changed, move |stream, peer| {
        Some(serve(stream, peer, router.clone(), ending.clone()))
    })
    .await;
}

/// Ends a request that takes too long, including the time to read its body.
async fn bounded(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let error = Json(json!({ "error": "the request took too long" }));
            (StatusCode::REQUEST_TIMEOUT, error).into_response()
        }
    }
}

async fn serve(stream: TcpStream, peer: SocketAddr, router: Router, stop: CancellationToken) {
    let own = stream.local_addr().ok();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        let router = router.clone();
        request.extensions_mut().insert(peer);
        if let Some(own) = own {
            let own = OwnAddress(own.ip().to_canonical());
            request.extensions_mut().insert(own);
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
                debug!(%error, "HTTP connection ended");
            }
        }
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            // This wait ends when the answer in progress is written. [`run`] limits the time of the
            // wait.
            connection.as_mut().await.ok();
        }
        () = tokio::time::sleep(CONNECTION_LIFETIME) => {}
    }
}

/// Maximum number of connections at the same time: scrapers, a proxy and a few people. If a further
/// connection comes, the oldest connection is closed, so that silent connections cannot lock out the proxy's
/// call-back, on which readiness depends.
pub const MAX_CONNECTIONS: usize = 64;
/// Largest head. hyper does not accept a limit below 8 KiB.
pub const MAX_HEAD_BYTES: usize = 16 << 10;
/// Longest time until a request's head is complete, and longest silence of a connection between two requests.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time of a request. Answers come from memory, so only a slow body takes time.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest life of a connection. The limit ends the connection of a client that does not read its answer.
/// Scrapers connect again.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);
const LAST_WORDS: Duration = Duration::from_millis(500);
