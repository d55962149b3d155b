//! Keeps web pages, and with keys also other hosts, from reading the pages about peers and requests.
//!
//! A browser on this host also connects from a loopback address, so the address does not show whether a web
//! page sent a request. A page can read only answers to requests that name the page's own host. With DNS
//! rebinding, the name of the page's host resolves to this host. But the `Host` header still has the name
//! of the page's host, so the server refuses the request.

use std::net::SocketAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use common::http_server::OwnAddress;
use common::origin::{host, is_local, is_of_another_site};
use tracing::warn;

use super::{Readers, refused};

/// Refuses a request of a client that may not read the page, and a request from a loopback address if a web page may have
/// sent it.
pub(super) async fn refuse(
    State(readers): State<Readers>,
    request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<SocketAddr>();
    let from = peer.map(|peer| peer.ip().to_canonical());
    let is_here = from.is_some_and(|from| from.is_loopback());
    // A client of this host that connects to another address of the host has that address itself.
    let own = request.extensions().get::<OwnAddress>().map(|own| own.0);
    let is_of_this_host = is_here || (from.is_some() && from == own);
    if readers == Readers::ThisHost && !is_of_this_host {
        return refused(
            StatusCode::FORBIDDEN,
            "with sidecar.auth: require, only clients on this host may read this page",
        );
    }
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
    !is_local(host(headers)) || is_of_another_site(headers)
}
