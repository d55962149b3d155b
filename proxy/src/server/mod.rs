//! The lifetime of one proxy: bind, run, drain.

pub(crate) mod accept;
pub(crate) mod admin;
pub(crate) mod api;
pub(crate) mod fd_limit;
pub(crate) mod incoming;
pub(crate) mod models;
pub(crate) mod otlp;
pub(crate) mod realtime;
pub(crate) mod seats;
pub(crate) mod session;
pub(crate) mod write_timeout;

use std::net::SocketAddr;
use std::sync::Arc;

use common::identity::{Identity, Watch};
use tokio::net::TcpListener;
use tokio::select;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::announce::{self, Announcer};
use crate::config::cli::Config;
use crate::membership::kv_events::KvEvents;
use crate::membership::ports::{self, PortError};
use crate::membership::registration::{Inputs, Registration};
use crate::membership::shared_registry::SharedRegistry;
use crate::server::accept::{Limits, Port};
use crate::server::otlp::Exporter;
use crate::state::app::{App, Instances};
use crate::state::tokenise::MAX_QUESTIONS;
use crate::upstream::client::Client;
use crate::upstream::tls::TlsError;

/// A proxy with both ports open.
pub struct Proxy {
    /// The key of this process and the roster; absent if no sidecar proves a key.
    identity: Option<Identity>,
    /// The files with the keys of HTTP clients and of engines.
    key_files: Watch,
    app: Arc<App>,
    listener: TcpListener,
    listen: SocketAddr,
    acceptor: Option<TlsAcceptor>,
    exporter: Option<Exporter>,
    registration: Registration,
    kv_events: KvEvents,
}

impl std::fmt::Debug for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Proxy")
            .field("listen", &self.listen)
            .finish_non_exhaustive()
    }
}

/// The reason why a proxy cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The HTTP port cannot be opened.
    #[error("cannot bind the HTTP port {address}: {source}")]
    Http {
        /// The configured address.
        address: SocketAddr,
        /// The error of the system.
        source: std::io::Error,
    },
    /// TLS cannot be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Configured instances are invalid.
    #[error("{}", .0.join("; "))]
    Instances(Vec<String>),
    /// The registration port cannot be opened.
    #[error(transparent)]
    Registration(#[from] PortError),
}

/// The signals that stop a proxy.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    /// Cancel this token to drain: the proxy refuses new requests, waits for the requests in flight, and
    /// ends.
    pub drain: CancellationToken,
    /// Cancel this token to break off requests that are still in flight while the proxy drains.
    pub now: CancellationToken,
}

/// The way in which a proxy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Every request in flight finished.
    Drained,
    /// Requests were broken off.
    ForcedShutdown,
    /// The registration port failed.
    PortFailed,
}

impl Proxy {
    /// Opens both ports.
    ///
    /// # Errors
    /// A port cannot be opened, or the flags or their files are invalid.
    pub async fn bind(config: Config) -> Result<Self, BindError> {
        let configured = config.sources.named().map_err(BindError::Instances)?;
        let acceptor = config.tls.acceptor()?;
        let client = Client::new(&config.tls, config.connect_timeout, config.idle_timeout)?;
        let address = config.addresses.listen();
        let failed = |source| BindError::Http { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let listen = listener.local_addr().map_err(failed)?;
        let identity = config.keys.identity().map_err(BindError::Instances)?;
        let key_files = config.access.files.load().map_err(BindError::Instances)?;
        let port = ports::bind(config.addresses.registration(), identity.as_ref()).await?;
        // The registration task and the requests communicate over these channels.
        let (published, instances) = watch::channel(Instances::from([]));
        let (suspects, suspected) = mpsc::channel(MAX_SUSPECTS);
        let (commands, commanded) = mpsc::channel(MAX_COMMANDS);
        let p2p = match config.addresses.p2p_registration {
            Some(address) => Some(ports::bind_p2p(address).await?),
            None => None,
        };
        let (spans, traced) = match &config.otlp {
            Some(base) => {
                let (spans, traced) = mpsc::channel(otlp::QUEUE);
                (Some(spans), Some((base.clone(), traced)))
            }
            None => (None, None),
        };
        let address = port.address();
        let (questions, questioned) = mpsc::channel(MAX_QUESTIONS);
        let queues = (spans, questions);
        let app = App::new(
            config, client, address, instances, suspects, commands, queues,
        );
        let app = Arc::new(app);
        let exporter = traced.map(|(base, spans)| Exporter::new(Arc::clone(&app), &base, spans));
        let inputs = Inputs {
            port,
            p2p,
            identity: identity.clone(),
            suspected,
            commanded,
        };
        Ok(Self {
            kv_events: KvEvents::new(Arc::clone(&app), questioned),
            registration: Registration::new(Arc::clone(&app), inputs, published, configured),
            identity,
            key_files,
            app,
            listener,
            listen,
            acceptor,
            exporter,
        })
    }

    /// Returns the address of the HTTP port.
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// Returns the address of the registration port.
    pub fn registration(&self) -> SocketAddr {
        self.app.registration
    }

    /// Returns a function that logs the statistics of the prefill legs. The function can be called while the
    /// proxy runs.
    pub fn summariser(&self) -> impl Fn() + Send + Sync + 'static {
        let app = Arc::clone(&self.app);
        move || summarise(&app)
    }

    /// Serves until `stop.drain` is cancelled or a task fails, and then drains.
    pub async fn run(self, stop: Stop) -> End {
        let app = self.app;
        let limits = Limits {
            connections: app.config.max_connections,
            client_timeout: app.config.client_timeout,
        };
        // `closing` ends the tasks. This token is cancelled only after draining, because requests in flight
        // need the tasks.
        let closing = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let port = Port {
            listener: self.listener,
            acceptor: self.acceptor,
        };
        let router = api::router(Arc::clone(&app));
        let http = accept::serve(Arc::clone(&app), port, router, limits, closing.clone());
        let registration = self.registration.run(closing.clone());
        tasks.spawn(async {
            http.await;
            Ok(())
        });
        tasks.spawn(registration);
        if let Some(identity) = self.identity {
            let closing = closing.clone();
            tasks.spawn(async move {
                tokio::select! {
                    biased;
                    () = closing.cancelled() => {}
                    () = identity.follow() => {}
                }
                Ok(())
            });
        }
        // Without such files SIGHUP ends the proxy, as it ends other programs.
        if !self.key_files.is_empty() {
            let (files, closing) = (app.config.access.files.clone(), closing.clone());
            tasks.spawn(async move {
                tokio::select! {
                    biased;
                    () = closing.cancelled() => {}
                    () = self.key_files.run(|| files.reread()) => {}
                }
                Ok(())
            });
        }
        if !app.config.kv_events.is_empty() {
            let (kv_events, closing) = (self.kv_events, closing.clone());
            tasks.spawn(async {
                kv_events.run(closing).await;
                Ok(())
            });
        }
        if let Some(exporter) = self.exporter {
            let closing = closing.clone();
            tasks.spawn(async {
                exporter.run(closing).await;
                Ok(())
            });
        }
        // The file of `--mooncake` was readable when the flags were checked. If the file has vanished since
        // then, the proxy does not announce its address.
        let metadata = app.config.mooncake.as_deref().map(announce::metadata);
        if let Some(Ok(Some(metadata))) = metadata {
            let announcer = Announcer::new(metadata, app.registration);
            let closing = closing.clone();
            tasks.spawn(async {
                announcer.run(closing).await;
                Ok(())
            });
        }
        if let Some(shared) = SharedRegistry::new(&app) {
            let closing = closing.clone();
            tasks.spawn(async {
                shared.run(closing).await;
                Ok(())
            });
        }

        // A task ends early only if it fails.
        let failed = select! {
            () = stop.drain.cancelled() => None,
            Some(ended) = tasks.join_next() => Some(ended),
        };
        // Drain first, then break off the rest, and end the tasks last, so that the last answers and spans
        // are still sent.
        app.draining.cancel();
        let mut end = drain(&app, &stop.now).await;
        summarise(&app);
        app.force_shutdown.cancel();
        closing.cancel();
        let mut ended = Vec::from_iter(failed);
        while let Some(next) = tasks.join_next().await {
            ended.push(next);
        }
        // A failed port decides the exit code. A task's panic is raised again, so that no defect is hidden.
        for task in ended {
            match task.map_err(tokio::task::JoinError::try_into_panic) {
                Ok(Ok(())) | Err(Err(_)) => {}
                Ok(Err(error)) => {
                    tracing::error!(%error, "stopped");
                    end = End::PortFailed;
                }
                Err(Ok(panic)) => std::panic::resume_unwind(panic),
            }
        }
        end
    }
}

/// Logs the statistics of the prefill legs.
fn summarise(app: &App) {
    match app.prefill_times.summary() {
        Some(summary) => info!("{summary}"),
        None => info!("no prefill leg was answered"),
    }
}

/// Waits until no request is in flight, until the drain timeout is over, or until `now` is cancelled.
async fn drain(app: &App, now: &CancellationToken) -> End {
    info!("draining: the proxy takes no new requests");
    select! {
        biased;
        drained = timeout(app.config.drain_timeout, app.drained()) => match drained {
            Ok(()) => {
                info!("drained");
                return End::Drained;
            }
            Err(_) => warn!("requests in flight are cut off: --drain-timeout is over"),
        },
        () = now.cancelled() => warn!("requests in flight are cut off: a second signal says to stop at once"),
    }
    End::ForcedShutdown
}

/// Maximum number of commands that wait for the registration task.
const MAX_COMMANDS: usize = 16;

/// Maximum number of instances that wait for a call-back after a failed leg.
const MAX_SUSPECTS: usize = 64;
