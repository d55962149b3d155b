//! The registry that several proxies share.
//!
//! Each proxy writes what it has itself found ready, under a lease of its own, and takes in what others
//! have written: as candidates, which it calls back before it uses them. So a proxy's death takes
//! nothing from the others, which go on writing what they still find ready; and an instance's death
//! takes its keys away one by one, as each proxy finds it not ready. Without etcd every proxy goes on
//! with whom it knows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::select;
use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use uuid::Uuid;

use crate::fleet::instance::Written;
use crate::fleet::registry::Command;
use crate::state::app::App;
use crate::upstream::etcd::{Etcd, EtcdError, Lease, Watch};

/// The task that writes and reads it.
pub(crate) struct SharedRegistry {
    app: Arc<App>,
    etcd: Etcd,
    prefix: String,
    /// This proxy, in its keys.
    name: String,
    lease: Option<Lease>,
    written: BTreeMap<String, String>,
    watch: Option<Watch>,
    is_lost: bool,
}

impl SharedRegistry {
    /// The task of one proxy; nothing without `--etcd`.
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

    /// Runs until `stop`; then its keys are taken back.
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
            // Many things change at once, such as all leases of a proxy that has died.
            sleep(GATHER).await;
            self.step().await;
        }
        if let Some(lease) = self.lease.take()
            && let Err(error) = self.etcd.revoke(&lease).await
        {
            debug!(%error, "the lease runs out by itself");
        }
    }

    async fn step(&mut self) {
        let done = self.exchange().await;
        self.app.metrics.shared(done.is_ok());
        match done {
            Ok(()) if self.is_lost => {
                self.is_lost = false;
                info!("the shared registry is back");
            }
            Ok(()) => {}
            Err(error) => {
                // The lease may have run out meanwhile: everything is written again.
                self.lease = None;
                self.watch = None;
                self.written.clear();
                if !std::mem::replace(&mut self.is_lost, true) {
                    warn!(%error, "no shared registry: going on with whom this proxy knows");
                }
            }
        }
    }

    async fn exchange(&mut self) -> Result<(), EtcdError> {
        let lease = match self.lease.take() {
            Some(lease) => self.etcd.renew(&lease).await.map(|()| lease)?,
            None => self.etcd.grant(LEASE).await?,
        };
        self.lease = Some(lease.clone());
        if self.watch.is_none() {
            // Before the list is read, so that nothing between the two is missed.
            self.watch = Some(self.etcd.watch(&self.prefix).await?);
        }
        self.write(&lease).await?;
        self.read().await
    }

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

    async fn read(&mut self) -> Result<(), EtcdError> {
        let mut others = Vec::new();
        for (key, value) in self.etcd.list(&self.prefix).await? {
            if key.ends_with(&format!("/{}", self.name)) {
                continue;
            }
            let instance = serde_json::from_str::<Written>(&value)
                .map_err(|e| e.to_string())
                .and_then(|written| written.instance())
                .and_then(|instance| self.app.config.access.check(&instance).map(|()| instance));
            match instance {
                Ok(instance) => others.push(instance),
                Err(error) => debug!(key, error, "an entry of the shared registry is not taken"),
            }
        }
        // Ends only with the proxy.
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

/// A proxy that has died is forgotten after this time.
const LEASE: Duration = Duration::from_secs(10);
/// Three times in a lease.
const RENEW_EVERY: Duration = Duration::from_secs(3);
/// Between a change and what is done about it.
const GATHER: Duration = Duration::from_millis(50);
