//! The process from start to exit code: status and metrics, the node, signals, the drain.

use std::sync::Arc;

use common::identity::{Auth, Identity};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::exit::Exit;
use crate::observe::admin::{Admin, Readers};
use crate::observe::listening;
use crate::observe::metrics::Metrics;
use crate::observe::observer::Fanout;
use crate::observe::proxy_discovery::ProxyDiscovery;
use crate::observe::registration::{ProxyVoice, Registration};
use crate::observe::status::Status;
use crate::peer::leftovers;
use crate::rank::node::{Ended, Node};

/// Runs until a signal arrives or a part of the process fails. The runtime has one thread: it only moves
/// messages between queues, and a second thread would only add wake-ups. Other threads move the KV.
pub(crate) fn run(config: Config) -> Exit {
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let served = match runtime {
        Ok(runtime) => runtime.block_on(serve(Arc::new(config))),
        Err(cause) => Err(cause.into()),
    };
    match served {
        Ok(exit) => exit,
        Err(cause) => {
            error!("{cause:#}");
            Exit::Unavailable
        }
    }
}

async fn serve(config: Arc<Config>) -> anyhow::Result<Exit> {
    // The signals are handled before anything starts, so that a SIGTERM during the start also ends in a
    // drain.
    let mut signals = Signals::new()?;
    let status = Arc::new(Status::new(&config));
    let metrics = Arc::new(Metrics::new(&status));
    // The admin server binds before the node starts, because the registration tells the proxy its port.
    let readers = match config.identity.as_ref().map(Identity::auth) {
        Some(Auth::Require) => Readers::ThisHost,
        Some(Auth::Prefer | Auth::Off) | None => Readers::AllHosts,
    };
    let admin = Admin::bind(
        &config.admin,
        Arc::clone(&status),
        Arc::clone(&metrics),
        readers,
    )
    .await?;
    let (leave, gone) = (CancellationToken::new(), CancellationToken::new());
    let mut searching = None;
    let (proxy, registration) = match &config.proxy {
        None => (None, None),
        Some(proxy) => {
            let (outlet, search) =
                ProxyDiscovery::of(&proxy.address, config.identity.as_ref()).await?;
            searching = search;
            let (voice, task) = Registration::new(
                outlet,
                Arc::clone(&config),
                admin.port(),
                Arc::clone(&status),
                metrics.proxy.clone(),
            );
            (Some::<ProxyVoice>(voice), Some(task))
        }
    };
    let observer = Fanout {
        status: Arc::clone(&status),
        proxy,
    };
    // From now on the node binds its ports and reports each change to the observer.
    let ranks = Arc::clone(&metrics.ranks);
    let node = Node::start(Arc::clone(&config), Arc::new(observer), ranks).await?;
    let mut ports = node.ports().clone();
    ports.insert(admin.port(), "admin".to_owned());
    // All ports are bound now. If a port is open that the configuration does not name, the start fails,
    // because such a port gives access to this process's memory.
    status.listens(listening::checked(&config, &ports)?);
    status.bound();
    info!(
        id = config.id,
        role = config.role.as_str(),
        "sidecar running"
    );
    let mut services = tokio::task::JoinSet::new();
    services.spawn(admin.run(gone.clone()));
    if !config.has_successors {
        services.spawn(leftovers::remove_dead(config.socket.clone(), gone.clone()));
    }
    if let Some(identity) = config.identity.clone() {
        let gone = gone.clone();
        services.spawn(async move {
            tokio::select! {
                biased;
                () = gone.cancelled() => {}
                () = identity.follow() => {}
            }
        });
    }
    if let Some(search) = searching {
        services.spawn(search.run(gone.clone()));
    }
    if let Some(registration) = registration {
        services.spawn(registration.run(leave.clone(), gone.clone()));
    }
    // The first signal starts the drain; a second signal ends the process even if requests are in flight.
    let drain = node.drain();
    let leaving = || {
        status.draining();
        leave.cancel();
    };
    let running = node.run();
    tokio::pin!(running);
    let ended = loop {
        tokio::select! {
            biased;
            ended = &mut running => break ended,
            name = signals.next() => {
                if drain.is_ending() {
                    warn!(signal = name, "stopping at once");
                    break Ended::Busy;
                }
                info!(signal = name, grace = ?config.times.drain, "draining; a second signal stops at once");
                leaving();
                drain.end();
            }
            () = drain.begins(), if !leave.is_cancelled() => {
                info!("a command asks for the drain: prefill engines can keep and push no new KV");
                leaving();
            }
        }
    };
    // The services end after the node, so that the proxy and the metrics scrapers can follow the drain until
    // its end.
    gone.cancel();
    while let Some(service) = services.join_next().await {
        if let Err(error) = service
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
    if ended == Ended::Drained && !config.has_successors {
        leftovers::remove_own(&config.socket);
    }
    Ok(match ended {
        Ended::Drained => Exit::Ok,
        Ended::Busy => Exit::Temporary,
        Ended::Broken => Exit::Internal,
    })
}

/// Raises the limit on open files to the highest value that this user may set.
///
/// The usual limit on open files is 1024, and one port alone accepts 1024 connections
/// (`common::zmq::MAX_PEERS`). So with the usual limit, any process that opens many connections to the alloc
/// port could lock out the engine, the proxy and the scrapers.
fn raise_descriptor_limit() {
    if let Err(error) = common::fd_limit::raise() {
        warn!(%error, "cannot raise the limit on open files");
    }
}

/// The signals that end a sidecar.
#[derive(Debug)]
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for the next signal and returns its name.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
