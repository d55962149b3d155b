//! Writes the address of the registration port into a metadata server. Sidecars that are configured by
//! Mooncake's file read the address there.

use std::net::SocketAddr;
use std::path::Path;

use discovery::{EVERY, HOLDS, Metadata, PROXY_KEY, Store};
use serde_json::Value;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// The task that writes the address, and renews it so that the key does not expire.
#[derive(Debug)]
pub(crate) struct Announcer {
    store: Store,
    metadata: Metadata,
    registration: SocketAddr,
}

/// Returns the metadata server that a `mooncake.json` names; `None` if sidecars with this file use no
/// metadata server.
///
/// # Errors
/// The file cannot be read, is not JSON, or names no usable metadata server.
pub(crate) fn metadata(file: &Path) -> Result<Option<Metadata>, String> {
    let named = |why: String| format!("--mooncake {}: {why}", file.display());
    let text = std::fs::read_to_string(file).map_err(|e| named(e.to_string()))?;
    let values: Value = serde_json::from_str(&text).map_err(|e| named(e.to_string()))?;
    let Some(server) = values["metadata_server"].as_str() else {
        return Err(named("the file has no metadata_server".to_owned()));
    };
    Metadata::parse(server, values["metadata_backend"].as_str()).map_err(|e| named(e.to_string()))
}

impl Announcer {
    /// Creates the task for a proxy whose registration port has the address `registration`.
    pub(crate) fn new(metadata: Metadata, registration: SocketAddr) -> Self {
        Self {
            store: Store::new(metadata.clone()),
            metadata,
            registration,
        }
    }

    /// Writes the address once per interval until `closing` is cancelled.
    pub(crate) async fn run(self, closing: CancellationToken) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut known = None;
        loop {
            tokio::select! {
                biased;
                () = closing.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let address = self.registration.to_string();
            let said = self.store.publish(PROXY_KEY, &address, HOLDS).await;
            // Log only changes: otherwise a metadata server that is down would fill the log.
            match (said, known) {
                (Ok(()), Some(true)) | (Err(_), Some(false)) => {}
                (Ok(()), _) => {
                    info!(metadata = %self.metadata, registration = %address, "the metadata server has the registration address");
                    known = Some(true);
                }
                (Err(error), _) => {
                    warn!("the metadata server does not take the registration address: {error}");
                    known = Some(false);
                }
            }
        }
    }
}
