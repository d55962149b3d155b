//! The registration task. The task owns the registry, receives messages on the registration ports, and calls
//! sidecars back.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::identity::Identity;
use common::zmq::{Frame, Inbox};
use protocol::receiver::Route;
use protocol::registration::InstanceRole;
use tokio::select;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::fleet::instance::{Instance, Source, Standing};
use crate::fleet::registry::Command;
use crate::fleet::registry::{Answer, Registry};
use crate::membership::callback::{CalledBack, call_back};
use crate::membership::ports::PortError;
use crate::state::app::{App, Instances};
use crate::telemetry::labels::{InstanceCounts, Message};

mod answers;
pub(crate) mod messages;
mod pairs;
mod peers;

use pairs::LoggedPairs;
pub(crate) use pairs::unfit;
use peers::roster_changed;

/// The registration task.
#[derive(Debug)]
pub(crate) struct Registration {
    app: Arc<App>,
    inputs: Inputs,
    registry: Registry,
    published: watch::Sender<Instances>,
    calls: JoinSet<CalledBack>,
    /// Time at which a refused registration was last logged; `None` if none was logged yet.
    warned: Option<Instant>,
    logged_pairs: LoggedPairs,
    /// The connection of each instance, by id and epoch, whose sidecar has proved a key.
    routes: HashMap<(String, u64), Route>,
}

/// The inputs of the registration task.
#[derive(Debug)]
pub(crate) struct Inputs {
    /// The registration port.
    pub port: Inbox,
    /// The port of P2P NCCL instances.
    pub p2p: Option<Inbox>,
    /// The roster of the sidecars that may register; absent if no sidecar proves a key.
    pub identity: Option<Identity>,
    /// Ids of instances that have failed a request.
    pub suspected: mpsc::Receiver<String>,
    /// Commands of the admin endpoints and of the shared registry.
    pub commanded: mpsc::Receiver<Command>,
}

/// The effect of one iteration of the task on the instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    /// Routing sees no change. Most messages are about single requests, so publishing the instances after
    /// each message would waste time.
    None,
    /// The instances may have changed.
    Instances,
}

impl Registration {
    /// Returns the registration task of one proxy.
    pub(crate) fn new(
        app: Arc<App>,
        inputs: Inputs,
        published: watch::Sender<Instances>,
        configured: Vec<Instance>,
    ) -> Self {
        let config = &app.config;
        let mut registry = Registry::new(config.max_instances, config.call_back_every);
        for instance in configured {
            let id = instance.id.clone();
            if let Err(error) = registry.name(Instant::now(), instance, None) {
                warn!(id, %error, "a configured instance is not accepted");
            }
        }
        Self {
            registry,
            app,
            inputs,
            published,
            calls: JoinSet::new(),
            warned: None,
            logged_pairs: LoggedPairs::default(),
            routes: HashMap::new(),
        }
    }

    /// Runs until `stop` is cancelled.
    ///
    /// # Errors
    /// A registration port has failed.
    pub(crate) async fn run(mut self, stop: CancellationToken) -> Result<(), PortError> {
        let mut sweep = interval(SWEEP);
        let mut pulse = interval(PULSE);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut changes = self.inputs.identity.as_ref().map(Identity::changes);
        self.settle();
        loop {
            let deadline = self.registry.next_deadline();
            let news = select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                // Before the deadlines: those that passed while the host stood still must not count.
                at = pulse.tick() => {
                    self.note_sleep(at.elapsed());
                    News::None
                }
                Some(done) = self.calls.join_next() => {
                    match done.map_err(JoinError::try_into_panic) {
                        Ok(called) => self.called_back(called),
                        Err(Ok(panic)) => std::panic::resume_unwind(panic),
                        Err(Err(_)) => {}
                    }
                    News::Instances
                }
                _ = sweep.tick() => {
                    self.shed().await;
                    News::None
                }
                () = until(deadline) => News::Instances,
                Some(command) = self.inputs.commanded.recv() => {
                    self.handle_command(command);
                    News::Instances
                }
                Some(id) = self.inputs.suspected.recv() => {
                    self.registry.suspect(Instant::now(), &id);
                    News::Instances
                }
                () = roster_changed(&mut changes) => {
                    self.tell_peers_to_all();
                    News::None
                }
                frame = self.inputs.port.recv() => self.take(frame?),
                frame = heard(self.inputs.p2p.as_mut()) => self.on_p2p_hello(frame?),
            };
            if news == News::Instances {
                self.settle();
            }
        }
    }

    /// Executes a command and sends its result back.
    fn handle_command(&mut self, command: Command) {
        // The command is executed even if the client leaves before the answer is sent.
        match command {
            Command::Name(instance, answer) => {
                let id = instance.id.clone();
                let taken = self.registry.name(Instant::now(), *instance, None);
                info!(id, taken = taken.is_ok(), "instance added");
                drop(answer.send(taken.map(drop).map_err(|e| e.to_string())));
            }
            Command::Share(others) => self.share(others),
            Command::Remove(id, answer) => {
                let gone = self.registry.remove(&id).is_some();
                info!(id, gone, "instance removed");
                answer.send(gone).ok();
            }
            Command::Drain(id, draining, answer) => {
                let there = self.registry.drain(&id, draining);
                info!(id, there, draining, "instance drained or resumed");
                answer.send(there).ok();
            }
        }
    }

    /// Adds instances that other proxies have written. Removes a shared instance that no proxy writes any
    /// more, unless the instance is ready at this proxy.
    fn share(&mut self, others: Vec<Instance>) {
        let now = Instant::now();
        let known = self.registry.instances();
        for instance in &others {
            let same = |other: &Instance| {
                // The sidecar's own registration is newer than another proxy's entry.
                let is_newest = other.source != Source::Shared || other.kv == instance.kv;
                other.id == instance.id && other.epoch == instance.epoch && is_newest
            };
            if known.iter().any(same) {
                continue;
            }
            let (id, epoch) = (instance.id.clone(), instance.epoch);
            match self.registry.name(now, instance.clone(), None) {
                Ok(_) => info!(id, epoch, "instance added from the shared registry"),
                Err(error) => self.log_rate_limited(now, &error.to_string()),
            }
        }
        for instance in known {
            let is_written = others.iter().any(|other| other.id == instance.id);
            if instance.source == Source::Shared && !is_written && !instance.is_ready() {
                info!(
                    id = instance.id,
                    "instance removed: it is gone from the shared registry"
                );
                self.registry.remove(&instance.id);
            }
        }
    }

    /// Notes the result of a call-back in the registry, the metrics and the log.
    fn called_back(&mut self, (call, answer, models): CalledBack) {
        self.app.metrics.called_back(&answer);
        if let Answer::Silent(error) = &answer {
            warn!(
                id = call.id,
                url = call.url.as_deref(),
                error,
                "call-back failed"
            );
        }
        let now = Instant::now();
        let changed = self.registry.called_back(now, &call.id, call.epoch, answer);
        self.confirm(now, &call.id, call.epoch);
        if let Some(instance) = changed {
            info!(id = instance.id, epoch = instance.epoch, standing = ?instance.standing,
                  "call-back");
        }
        if let Some(models) = models {
            let (first, count) = (models.base().map(str::to_owned), models.names().count());
            if self.registry.learned(&call.id, call.epoch, models) {
                info!(id = call.id, model = first, names = count, "models");
            }
        }
    }

    /// Removes instances whose lease has ended, makes the call-backs that are due, and publishes the
    /// instances for routing.
    fn settle(&mut self) {
        let now = Instant::now();
        for gone in self.registry.expire(now) {
            warn!(
                id = gone.id,
                epoch = gone.epoch,
                "gone: no heartbeat for three periods"
            );
        }
        self.forget_routes();
        for dispute in self.registry.disputes() {
            error!("{dispute}");
        }
        for call in self.registry.due(now) {
            self.calls.spawn(call_back(Arc::clone(&self.app), call));
        }
        let instances: Instances = self
            .registry
            .instances()
            .into_iter()
            .map(Arc::new)
            .collect();
        self.app.metrics.show_instances(&count(&instances));
        for before in self.published.borrow().iter() {
            let is_same = |now: &&Arc<Instance>| now.id == before.id && now.epoch == before.epoch;
            let after = instances.iter().find(is_same);
            let is_there = |i: &Instance| i.standing == Standing::Ready;
            if is_there(before) && !after.is_some_and(|after| is_there(after)) {
                // The engine may have been restarted while the instance was not ready, so the facts that the
                // proxy knows about the engine's cache and refusals may be wrong.
                self.app.prefix_index.forget(&before.id);
                self.app.kv_index.forget(&before.id);
                self.app.refusals.forget(&before.id);
            }
        }
        self.logged_pairs.log(&instances);
        self.app.models.adopt(&instances);
        self.published.send_replace(instances);
    }

    /// Extends all leases if the last pulse came `late`. A host that stands still for some seconds (a virtual machine
    /// that is moved, for example) would else lose all its instances at once.
    fn note_sleep(&mut self, late: Duration) {
        if late > PULSE {
            warn!(
                ?late,
                "the proxy did not run: leases are extended by this time"
            );
            self.registry.slept(late);
        }
    }

    /// Closes and counts the connections to the registration port that exceed the port's limit.
    async fn shed(&self) {
        for _ in 0..self.inputs.port.shed().await {
            self.app.metrics.message(Message::Shed);
        }
    }
}

/// Counts the instances by role and standing.
fn count(instances: &Instances) -> InstanceCounts {
    let mut counts = InstanceCounts::default();
    for instance in instances.iter() {
        counts.0[role(instance)][state(instance)] += 1;
    }
    counts
}

fn role(instance: &Instance) -> usize {
    match instance.role {
        InstanceRole::Prefill => 0,
        InstanceRole::Decode => 1,
        InstanceRole::Both => 2,
    }
}

fn state(instance: &Instance) -> usize {
    match instance.standing {
        Standing::Unverified => 0,
        Standing::Ready => 1,
        Standing::NotReady(_) => 2,
    }
}

/// Receives the next frame of a port. Waits forever if there is no port.
async fn heard(port: Option<&mut Inbox>) -> Result<Frame, PortError> {
    match port {
        Some(port) => Ok(port.recv().await?),
        None => std::future::pending().await,
    }
}

/// Waits until the deadline. Waits forever if there is no deadline.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Interval at which the task looks whether it runs in time.
const PULSE: Duration = Duration::from_millis(250);

/// Interval at which the task closes connections that exceed the limit of the registration port.
const SWEEP: Duration = Duration::from_secs(5);
