//! Says in a metadata server where sidecars register, for those that are configured by Mooncake's file.

use std::net::SocketAddr;
use std::path::Path;

use discovery::{EVERY, HOLDS, Metadata, PROXY_KEY, Store};
use serde_json::Value;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Writes one key, again and again.
#[derive(Debug)]
pub(crate) struct Announcer {
    store: Store,
    metadata: Metadata,
    registration: SocketAddr,
}

/// The metadata server that a `mooncake.json` names; `None` if it names none.
///
/// # Errors
/// What is wrong with the file.
pub(crate) fn metadata(file: &Path) -> Result<Option<Metadata>, String> {
    let named = |why: String| format!("--mooncake {}: {why}", file.display());
    let text = std::fs::read_to_string(file).map_err(|e| named(e.to_string()))?;
    let values: Value = serde_json::from_str(&text).map_err(|e| named(e.to_string()))?;
    let Some(server) = values["metadata_server"].as_str() else {
        return Err(named("no metadata_server".to_owned()));
    };
    Metadata::parse(server, values["metadata_backend"].as_str()).map_err(|e| named(e.to_string()))
}

impl Announcer {
    /// Of a proxy that takes registrations there.
    pub(crate) fn new(metadata: Metadata, registration: SocketAddr) -> Self {
        Self {
            store: Store::new(metadata.clone()),
            metadata,
            registration,
        }
    }

    /// Runs until `closing`.
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
            // Each change is said once.
            match (said, known) {
                (Ok(()), Some(true)) | (Err(_), Some(false)) => {}
                (Ok(()), _) => {
                    info!(metadata = %self.metadata, registration = %address, "sidecars are told where to register");
                    known = Some(true);
                }
                (Err(error), _) => {
                    warn!("sidecars are not told where to register: {error}");
                    known = Some(false);
                }
            }
        }
    }
}
