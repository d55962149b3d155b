//! The registry that several proxies share in etcd.
//!
//! Each proxy writes the instances that it has itself found ready, under its own lease. Each proxy also adds
//! the instances that other proxies have written, and calls an instance back before it sends requests to this
//! instance. If a proxy dies, the other proxies lose no instance, because each of them has written the
//! instances that it finds ready. If an instance dies, each proxy deletes its own key of the instance as soon
//! as the proxy finds the instance not ready. If etcd fails, each proxy continues with the instances that it
//! knows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use common::etcd::{Etcd, EtcdError, Lease, Watch};
use tokio::select;
use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uuid::Uuid;

use crate::fleet::instance::Written;
use crate::fleet::registry::Command;
use crate::state::app::App;
use crate::upstream::client::Client;
use crate::upstream::pool::LinkBody;

/// The task that writes and reads the shared registry.
pub(crate) struct SharedRegistry {
    app: Arc<App>,
    etcd: Etcd<Client>,
    prefix: String,
    /// The name of this proxy in its keys, random per process.
    name: String,
    lease: Option<Lease>,
    written: BTreeMap<String, String>,
    watch: Option<Watch<LinkBody>>,
    is_lost: bool,
}

impl SharedRegistry {
    /// Returns the task of one proxy; `None` without `--etcd`.
    pub(crate) fn new(app: &Arc<App>) -> Option<Self> {
        let config = &app.config;
        if config.etcd.is_empty() {
            return None;
        }
        let urls = config
            .etcd
            .iter()
            .map(|url| url.trim_end_matches('/').to_owned());
        Some(Self {
            etcd: Etcd::new(app.client.clone(), urls.collect()),
            prefix: format!("{}/instances/", config.etcd_prefix.trim_end_matches('/')),
            name: Uuid::new_v4().simple().to_string(),
            app: Arc::clone(app),
            lease: None,
            written: BTreeMap::new(),
            watch: None,
            is_lost: false,
        })
    }

    /// Runs until `stop` is cancelled, and then revokes the lease, which deletes this proxy's keys.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut instances = self.app.instances.clone();
        let mut beat = interval(RENEW_EVERY);
        loop {
            let changed = async {
                match &mut self.watch {
                    Some(watch) => watch.changed().await,
                    None => std::future::pending().await,
                }
            };
            select! {
                biased;
                () = stop.cancelled() => break,
                _ = beat.tick() => {}
                _ = instances.changed() => {}
                more = changed => if !more {
                    self.watch = None;
                },
            }
            // Wait a moment, because many changes come at once, such as the keys of a proxy that has died.
            sleep(GATHER).await;
            self.step().await;
        }
        if let Some(lease) = self.lease.take()
            && let Err(error) = self.etcd.revoke(&lease).await
        {
            debug!(%error, "the lease is not revoked and expires by itself");
        }
    }

    /// Exchanges the instances with etcd once. Logs only the first failure, and the first success after a
    /// failure.
    async fn step(&mut self) {
        let done = self.exchange().await;
        self.app.metrics.shared(done.is_ok());
        match done {
            Ok(()) if self.is_lost => {
                self.is_lost = false;
                info!("the shared registry answers again");
            }
            Ok(()) => {}
            Err(error) => {
                // The lease may have expired in the meantime, and etcd has then deleted its keys, so write
                // everything again.
                self.lease = None;
                self.watch = None;
                self.written.clear();
                if !std::mem::replace(&mut self.is_lost, true) {
                    warn!(%error, "the shared registry does not answer: the proxy goes on with the instances that it knows");
                }
            }
        }
    }

    /// Renews the lease, writes this proxy's instances, and reads the instances of the other proxies.
    async fn exchange(&mut self) -> Result<(), EtcdError> {
        let lease = match self.lease.take() {
            Some(lease) => self.etcd.renew(&lease).await.map(|()| lease)?,
            None => self.etcd.grant(LEASE).await?,
        };
        self.lease = Some(lease.clone());
        if self.watch.is_none() {
            // Start the watch before reading the list, so that no change between the list and the watch is
            // missed.
            self.watch = Some(self.etcd.watch(&self.prefix).await?);
        }
        self.write(&lease).await?;
        self.read().await
    }

    /// Writes the ready instances whose entry has changed, and deletes the keys of instances that are not
    /// ready any more.
    async fn write(&mut self, lease: &Lease) -> Result<(), EtcdError> {
        let ready = self.app.instances();
        let ready = ready.iter().filter(|instance| instance.is_ready());
        let wanted: BTreeMap<String, String> = ready
            .filter_map(|instance| {
                let key = format!("{}{}/{}", self.prefix, instance.id, self.name);
                Some((key, serde_json::to_string(&Written::of(instance)).ok()?))
            })
            .collect();
        for (key, value) in &wanted {
            if self.written.get(key) != Some(value) {
                self.etcd.put(lease, key, value).await?;
                self.written.insert(key.clone(), value.clone());
            }
        }
        let gone: Vec<_> = self
            .written
            .keys()
            .filter(|key| !wanted.contains_key(*key))
            .cloned()
            .collect();
        for key in gone {
            self.etcd.delete(&key).await?;
            self.written.remove(&key);
        }
        Ok(())
    }

    /// Reads the entries of the other proxies and passes them to the registration task.
    async fn read(&mut self) -> Result<(), EtcdError> {
        let mut others = Vec::new();
        for (key, value) in self.etcd.list(&self.prefix).await? {
            if key.ends_with(&format!("/{}", self.name)) {
                continue;
            }
            let instance = serde_json::from_str::<Written>(&value)
                .map_err(|e| e.to_string())
                .and_then(|written| written.instance())
                .and_then(|instance| {
                    self.app
                        .config
                        .access
                        .check(instance.hosts())
                        .map(|()| instance)
                });
            match instance {
                Ok(instance) => others.push(instance),
                Err(error) => debug!(
                    key,
                    error, "an entry of the shared registry is not accepted"
                ),
            }
        }
        // Sending fails only when the proxy ends.
        drop(self.app.commands.send(Command::Share(others)).await);
        Ok(())
    }
}

impl std::fmt::Debug for SharedRegistry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedRegistry")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// The duration of the lease: the keys of a proxy that has died expire after this time.
const LEASE: Duration = Duration::from_secs(10);
/// Interval of renewal: three times per lease, so that one lost renewal does no harm.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// Time between a change and the exchange with etcd.
const GATHER: Duration = Duration::from_millis(50);
