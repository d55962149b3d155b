//! The process from start to end: cache, ports, signals, drain.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use common::http_server;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cache::{Cache, OpenError, Sizes};
use crate::lm::{Bounds, Server};
use crate::metrics::{self, Metrics};
use crate::remote::{self, Remote};

/// The settings of a store.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address of the `lm://` port, `HOST:PORT`.
    pub listen: String,
    /// Address of the admin server, `HOST:PORT`.
    pub admin: String,
    /// Sizes of the cache.
    pub sizes: Sizes,
    /// The remote store; absent if there is none.
    pub remote: Option<remote::Settings>,
    /// Limits of the port.
    pub bounds: Bounds,
    /// Time for requests that have begun when the store stops, and then for values that wait for the remote store.
    pub grace: Duration,
}

/// Error of a store that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// See [`OpenError`].
    #[error(transparent)]
    Cache(#[from] OpenError),
    /// The settings of the remote store cannot be used, or a check of it failed.
    #[error("{0}")]
    Remote(String),
    /// A port cannot be bound.
    #[error("{flag} {address}: {cause}")]
    Bind {
        /// The flag with the address.
        flag: &'static str,
        /// The address as given.
        address: String,
        /// The error of the kernel or of the resolver.
        cause: std::io::Error,
    },
    /// The process cannot handle signals.
    #[error("cannot handle signals: {0}")]
    Signals(std::io::Error),
}

/// Runs a store until SIGTERM or SIGINT. A second signal ends it at once.
///
/// # Errors
/// See [`StartError`].
pub async fn run(settings: Settings) -> Result<(), StartError> {
    // The signals are handled before anything starts, so that a signal during the start also ends in order.
    let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    if let Err(error) = common::fd_limit::raise() {
        warn!(%error, "cannot raise the limit on open files");
    }
    let remote = settings.remote.map(Remote::open).transpose();
    let remote = remote.map_err(StartError::Remote)?;
    let cache = Cache::open(&settings.sizes, remote).await?;
    let counted = Metrics::default();
    let registry = counted.registry(cache.clone());
    let admin = TcpListener::bind(&settings.admin)
        .await
        .map_err(failed("--admin", &settings.admin))?;
    let server = Server::bind(&settings.listen, cache.clone(), settings.bounds, counted)
        .await
        .map_err(failed("--listen", &settings.listen))?;
    let address = admin
        .local_addr()
        .map_err(failed("--admin", &settings.admin))?;
    info!(listen = %server.local(), admin = %address, "store running");
    let (stop, gone) = (CancellationToken::new(), CancellationToken::new());
    let pages = tokio::spawn(http_server::run(
        admin,
        router(registry, stop.clone()),
        gone.clone(),
    ));
    let mut serving = tokio::spawn(server.run(stop.clone(), settings.grace));
    let mut next = async || {
        tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        }
    };
    let name = next().await;
    info!(signal = name, grace = ?settings.grace, "stopping; a second signal stops at once");
    stop.cancel();
    tokio::select! {
        () = async {
            (&mut serving).await.ok();
            cache.close(settings.grace).await;
        } => {}
        name = next() => warn!(signal = name, "stopping at once"),
    }
    gone.cancel();
    if let Err(error) = pages.await
        && error.is_panic()
    {
        std::panic::resume_unwind(error.into_panic());
    }
    Ok(())
}

/// Checks what the settings name, without starting the store: the folder of the disk, and the remote store with a value
/// that is written and read. Returns a line for each.
///
/// # Errors
/// See [`StartError`].
pub async fn check(settings: Settings) -> Result<Vec<String>, StartError> {
    let sizes = &settings.sizes;
    sizes.check()?;
    let mut lines = vec![format!("memory: {} bytes", sizes.memory)];
    lines.push(match &sizes.disk {
        Some(disk) => format!("disk: {} bytes in {}", disk.bytes, disk.folder.display()),
        None => "disk: none".to_owned(),
    });
    lines.push(match settings.remote {
        None => "remote: none".to_owned(),
        Some(remote) => {
            let address = remote.address.to_string();
            let remote = Remote::open(remote).map_err(StartError::Remote)?;
            let failed = |cause| StartError::Remote(format!("--remote {address}: {cause}"));
            remote.check().await.map_err(failed)?;
            format!("remote: {address}, a value was written and read")
        }
    });
    Ok(lines)
}

fn failed(flag: &'static str, address: &str) -> impl FnOnce(std::io::Error) -> StartError {
    let address = address.to_owned();
    move |cause| StartError::Bind {
        flag,
        address,
        cause,
    }
}

fn router(registry: Arc<Registry>, stop: CancellationToken) -> Router {
    let ready = move || {
        let stopping = stop.is_cancelled();
        async move { ready(stopping) }
    };
    let exposition = move || {
        let text = metrics::text(&registry);
        async move { ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text) }
    };
    Router::new()
        .route("/health", get(async || r#"{"live":true}"#))
        .route("/ready", get(ready))
        .route("/metrics", get(exposition))
}

fn ready(stopping: bool) -> Response {
    let code = if stopping {
        StatusCode::SERVICE_UNAVAILABLE
    } else {
        StatusCode::OK
    };
    (code, format!(r#"{{"ready":{}}}"#, !stopping)).into_response()
}
