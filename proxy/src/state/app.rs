//! What every request and task of one proxy shares.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::config::cli::Config;
use crate::fleet::instance::Instance;
use crate::fleet::load::LoadSnapshot;
use crate::fleet::registry::Command;
use crate::routing::SideChoice;
use crate::routing::mode::{CurrentMode, Measured, Mode};
use crate::routing::policy::Policy;
use crate::routing::prefix_index::PrefixIndex;
use crate::routing::refusals::Refusals;
use crate::state::in_flight::InFlight;
use crate::state::uploads::Uploads;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::prefill_times::PrefillTimes;
use crate::telemetry::record::Recent;
use crate::upstream::client::Client;

/// The instances as routing sees them; replaced as a whole at each change.
pub(crate) type Instances = Arc<[Arc<Instance>]>;

/// One proxy.
#[derive(Debug)]
pub(crate) struct App {
    /// Its flags.
    pub config: Config,
    /// The address that call-backs name.
    pub registration: SocketAddr,
    /// Connections to engines and sidecars.
    pub client: Client,
    /// Who is there; written by the registration task.
    pub instances: watch::Receiver<Instances>,
    /// Requests under way.
    pub in_flight: Arc<InFlight>,
    /// Requests that have ended.
    pub recent: Recent,
    /// What is counted.
    pub metrics: Metrics,
    /// What prefill legs took.
    pub prefill_times: PrefillTimes,
    /// What instances hold.
    pub prefix_index: PrefixIndex,
    /// What prefill instances will not hand over.
    pub refusals: Refusals,
    /// Which requests get a prefill leg.
    pub mode: CurrentMode,
    /// What prefill and hand-over cost.
    pub measured: Measured,
    /// Set when no new request is taken any more.
    pub draining: CancellationToken,
    /// Set when requests under way are cut off.
    pub force_shutdown: CancellationToken,
    /// Spans for the collector; absent without `--otlp`.
    pub spans: Option<mpsc::Sender<Value>>,
    /// What the registration task is asked to do.
    pub commands: mpsc::Sender<Command>,
    /// Bodies on their way in.
    pub uploads: Arc<Uploads>,
    suspects: mpsc::Sender<String>,
    slots: Arc<Semaphore>,
    decode_turn: AtomicUsize,
    prefill_turn: AtomicUsize,
}

impl App {
    /// A proxy without instances.
    pub(crate) fn new(
        config: Config,
        client: Client,
        registration: SocketAddr,
        instances: watch::Receiver<Instances>,
        suspects: mpsc::Sender<String>,
        commands: mpsc::Sender<Command>,
        spans: Option<mpsc::Sender<Value>>,
    ) -> Self {
        let mode = CurrentMode::default();
        mode.set(config.mode);
        Self {
            mode,
            prefix_index: PrefixIndex::default(),
            refusals: Refusals::default(),
            measured: Measured::default(),
            client,
            slots: Arc::new(Semaphore::new(config.max_in_flight)),
            uploads: Arc::new(Uploads::new(config.max_in_flight, config.upload_bytes())),
            config,
            registration,
            instances,
            suspects,
            commands,
            spans,
            in_flight: Arc::default(),
            recent: Recent::default(),
            metrics: Metrics::new(),
            prefill_times: PrefillTimes::default(),
            draining: CancellationToken::new(),
            force_shutdown: CancellationToken::new(),
            decode_turn: AtomicUsize::new(0),
            prefill_turn: AtomicUsize::new(0),
        }
    }

    /// A place for one more request, or `None` if all are taken.
    pub(crate) fn admit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.slots).try_acquire_owned().ok()
    }

    /// Returns when no request is under way any more; none begins while it waits.
    pub(crate) async fn drained(&self) {
        let all = u32::try_from(self.config.max_in_flight).unwrap_or(u32::MAX);
        // Never closed, so the only end is success.
        drop(self.slots.acquire_many(all).await);
    }

    /// A leg could not reach this instance: it is called back before the next health check is due.
    pub(crate) fn suspect(&self, id: &str) {
        // A full queue has other suspects, which are most likely the same ones.
        drop(self.suspects.try_send(id.to_owned()));
    }

    /// The instances now.
    pub(crate) fn instances(&self) -> Instances {
        Arc::clone(&self.instances.borrow())
    }

    /// The next place in turn on either side; requests with transfers are counted apart, so that
    /// those of the other kind do not skip prefill instances.
    pub(crate) fn next_turn(&self, transfers: Transfers) -> (SideChoice, SideChoice) {
        let prefill = match transfers {
            Transfers::Yes => self.prefill_turn.fetch_add(1, Ordering::Relaxed),
            Transfers::No => 0,
        };
        let side = |policy, turn| SideChoice { policy, turn };
        (
            side(self.config.prefill_policy, prefill),
            side(
                self.config.decode_policy,
                self.decode_turn.fetch_add(1, Ordering::Relaxed),
            ),
        )
    }

    /// Whether anything depends on what was routed before.
    pub(crate) fn remembers(&self) -> bool {
        let policies = [self.config.prefill_policy, self.config.decode_policy];
        self.mode.get() != Mode::Pd || policies.contains(&Policy::Prefix)
    }
}

/// How busy instances are, in their order.
pub(crate) fn load_snapshots(instances: &Instances) -> Vec<LoadSnapshot> {
    let now = Instant::now();
    instances.iter().map(|i| i.load.snapshot(now)).collect()
}

/// Whether a request may have a prefill leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfers {
    /// It may.
    Yes,
    /// It is computed by its decode instance alone.
    No,
}
