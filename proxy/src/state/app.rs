//! The state that all requests and tasks of one proxy share.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::config::cli::Config;
use crate::fleet::instance::Instance;
use crate::fleet::load::LoadSnapshot;
use crate::fleet::registry::Command;
use crate::routing::kv_index::KvIndex;
use crate::routing::mode::CurrentMode;
use crate::routing::models::Models;
use crate::routing::prefix_index::PrefixIndex;
use crate::routing::refusals::Refusals;
use crate::state::in_flight::InFlight;
use crate::state::stored_responses::StoredResponses;
use crate::state::tokenise::Question;
use crate::state::uploads::Uploads;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::prefill_times::PrefillTimes;
use crate::telemetry::record::Recent;
use crate::upstream::client::Client;

/// The instances as routing sees them. The registration task replaces the whole list at each change.
pub(crate) type Instances = Arc<[Arc<Instance>]>;

/// The shared state of one proxy.
#[derive(Debug)]
pub(crate) struct App {
    /// The proxy's flags.
    pub config: Config,
    /// The address of the registration port. Each call-back names the address, so that a sidecar knows which
    /// proxy calls.
    pub registration: SocketAddr,
    /// The HTTP client with the connections to engines and sidecars.
    pub client: Client,
    /// The registered instances, written by the registration task.
    pub instances: watch::Receiver<Instances>,
    /// Requests in flight that have had a prefill leg.
    pub in_flight: Arc<InFlight>,
    /// The records of the last requests that have ended.
    pub recent: Recent,
    /// The proxy's metrics.
    pub metrics: Metrics,
    /// Times of the prefill legs, for the summary in the log.
    pub prefill_times: PrefillTimes,
    /// Prefixes that each instance is known to have cached, and the conversations.
    pub prefix_index: PrefixIndex,
    /// The blocks of the engines that publish KV events.
    pub kv_index: KvIndex,
    /// Queue of questions for the tokens of prompts.
    pub questions: mpsc::Sender<Question>,
    /// The instances that hold stored responses.
    pub stored_responses: StoredResponses,
    /// Kinds of requests for which a prefill instance is known to hand over no KV.
    pub refusals: Refusals,
    /// The mode of all models that have no other mode. It decides which requests get a prefill leg.
    pub mode: CurrentMode,
    /// The state of each model.
    pub models: Models,
    /// This token is cancelled when the proxy begins to drain: from then on, the proxy refuses new
    /// requests.
    pub draining: CancellationToken,
    /// This token is cancelled when the proxy breaks off the requests in flight.
    pub force_shutdown: CancellationToken,
    /// Queue of spans for the collector; `None` without `--otlp`.
    pub spans: Option<mpsc::Sender<Value>>,
    /// Queue of commands for the registration task.
    pub commands: mpsc::Sender<Command>,
    /// Request bodies that are being received.
    pub uploads: Arc<Uploads>,
    suspects: mpsc::Sender<String>,
    slots: Arc<Semaphore>,
}

impl App {
    /// Returns the state of a proxy to which no request has come yet.
    pub(crate) fn new(
        config: Config,
        client: Client,
        registration: SocketAddr,
        instances: watch::Receiver<Instances>,
        suspects: mpsc::Sender<String>,
        commands: mpsc::Sender<Command>,
        (spans, questions): (Option<mpsc::Sender<Value>>, mpsc::Sender<Question>),
    ) -> Self {
        let mode = CurrentMode::default();
        mode.set(config.mode);
        Self {
            mode,
            prefix_index: PrefixIndex::default(),
            kv_index: KvIndex::default(),
            questions,
            refusals: Refusals::default(),
            stored_responses: StoredResponses::default(),
            models: Models::new(config.rules(), config.model_rules()),
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
        }
    }

    /// Reserves a place for one more request. Returns `None` if `--max-in-flight` requests are in flight.
    pub(crate) fn admit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.slots).try_acquire_owned().ok()
    }

    /// Waits until no request is in flight. No request can begin while this function waits.
    pub(crate) async fn drained(&self) {
        let all = u32::try_from(self.config.max_in_flight).unwrap_or(u32::MAX);
        // The semaphore is never closed, so the call cannot fail.
        drop(self.slots.acquire_many(all).await);
    }

    /// Asks the registration task to call this instance back at once, because a leg to the instance has
    /// failed. Without this call-back, the proxy would send requests to a dead instance until the next health
    /// check is due.
    pub(crate) fn suspect(&self, id: &str) {
        // If the queue is full, it most likely holds this instance already.
        drop(self.suspects.try_send(id.to_owned()));
    }

    /// Returns the current list of instances.
    pub(crate) fn instances(&self) -> Instances {
        Arc::clone(&self.instances.borrow())
    }
}

/// Returns the load of each instance, in the order of `instances`.
pub(crate) fn load_snapshots(instances: &Instances) -> Vec<LoadSnapshot> {
    let now = Instant::now();
    instances.iter().map(|i| i.load.snapshot(now)).collect()
}
