//! Keeps web pages from reading the answers of the admin server.
//!
//! A browser on this host also connects from a loopback address. A page can read only answers of its own host
//! name. With DNS rebinding that name resolves to this host, but the `Host` header still has the name.

use std::net::{IpAddr, SocketAddr};

use axum::extract::Request;
use axum::http::header::HOST;
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use tracing::warn;

use super::refused;

/// Refuses a request from a loopback address if a web page may have sent it.
pub(super) async fn refuse(request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<SocketAddr>();
    let is_here = peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback());
    if is_here && is_a_page(request.headers()) {
        let path = request.uri().path();
        warn!(
            path,
            "refused a request from a web page (header Host or Sec-Fetch-Site)"
        );
        return refused(
            StatusCode::FORBIDDEN,
            "the header Host must be localhost or a loopback address, and a page of another site may not ask",
        );
    }
    next.run(request).await
}

fn is_a_page(headers: &HeaderMap) -> bool {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let site = headers.get("sec-fetch-site").map(|site| site.as_bytes());
    !is_local(host.unwrap_or_default())
        || site.is_some_and(|site| site != b"same-origin" && site != b"none")
}

/// Returns true if `HOST[:PORT]` names this host by loopback address or by `localhost`.
fn is_local(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|at| at.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    match name.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => name == "localhost" || name.ends_with(".localhost"),
    }
}
