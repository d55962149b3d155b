//! Finds the proxy's address, which is in the configuration or at a metadata server.

use std::time::Duration;

use bytes::Bytes;
use common::identity::{Identity, Role as Part};
use common::zmq::{Closed, Listener, Protection, Push};
use discovery::{EVERY, Metadata, PROXY_KEY, Store};
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::{HostPort, ProxyAddress, read};
use crate::observe::registration::{Outlet, Refused};

/// The connection to the proxy. While the proxy's address is not known, messages are dropped and counted.
/// Registrations are repeated, so the proxy gets a registration soon after its address is known.
#[derive(Debug)]
pub(crate) struct ProxyDiscovery {
    push: Option<Push>,
    found: mpsc::Receiver<Push>,
}

/// Asks the metadata server for the proxy's address again and again, because the proxy may move.
#[derive(Debug)]
pub(crate) struct Search {
    store: Store,
    metadata: Metadata,
    at: Option<HostPort>,
    protection: Protection,
    found: mpsc::Sender<Push>,
}

impl ProxyDiscovery {
    /// Returns the connection to a proxy, and the task that searches for the proxy if its address is not
    /// configured.
    ///
    /// # Errors
    /// The socket cannot begin to connect.
    pub(crate) async fn of(
        address: &ProxyAddress,
        identity: Option<&Identity>,
    ) -> Result<(Self, Option<Search>), Closed> {
        let protection = Protection::of(identity, &[Part::Proxy]);
        let (tell, found) = mpsc::channel(1);
        match address {
            ProxyAddress::At(at) => {
                let push = Some(Push::connect(&at.host, at.port, &protection).await?);
                Ok((Self { push, found }, None))
            }
            ProxyAddress::AskedFor(metadata) => {
                let search = Search {
                    store: Store::new(metadata.clone()),
                    metadata: metadata.clone(),
                    at: None,
                    protection,
                    found: tell,
                };
                Ok((Self { push: None, found }, Some(search)))
            }
        }
    }
}

impl Outlet for ProxyDiscovery {
    fn send(&mut self, payload: Vec<u8>) -> Result<(), Refused> {
        if let Ok(push) = self.found.try_recv() {
            self.push = Some(push);
        }
        let push = self.push.as_mut().ok_or(Refused)?;
        push.send(payload).map_err(|_| Refused)
    }

    fn listener(&mut self) -> BoxFuture<'_, Listener> {
        Box::pin(async {
            match &mut self.push {
                Some(push) => push.listener().await,
                None => Listener::Nobody,
            }
        })
    }

    fn heard(&mut self) -> BoxFuture<'_, Bytes> {
        Box::pin(async {
            match &mut self.push {
                Some(push) => push.heard().await,
                None => std::future::pending().await,
            }
        })
    }

    fn close(self) -> BoxFuture<'static, ()> {
        Box::pin(async {
            if let Some(push) = self.push {
                push.close().await;
            }
        })
    }
}

impl Search {
    /// Searches for the proxy until `stop` is cancelled.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut said = String::new();
        loop {
            let trouble = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                trouble = self.look() => trouble,
            };
            // A fault that repeats is logged only once, not at each attempt.
            if let Some(trouble) = trouble.filter(|t| *t != said) {
                warn!(metadata = %self.metadata, "cannot find the proxy: {trouble}");
                said = trouble;
            }
            let pause = if self.at.is_some() { EVERY } else { UNKNOWN };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Asks for the proxy's address once, and connects if the address is new. Returns the reason why
    /// the proxy was not found; absent if it was found.
    async fn look(&mut self) -> Option<String> {
        let text = match self.store.find(PROXY_KEY).await {
            Ok(Some(text)) => text,
            // A proxy that was found before may come back, so its connection is kept.
            Ok(None) => {
                return self
                    .at
                    .is_none()
                    .then(|| format!("the server has no key {PROXY_KEY}"));
            }
            Err(error) => return Some(error.to_string()),
        };
        let at = match read::<HostPort>(&text) {
            Ok(at) => at,
            Err(error) => return Some(format!("{PROXY_KEY} is {text:?}: {error}")),
        };
        if self.at.as_ref() == Some(&at) {
            return None;
        }
        let Ok(push) = Push::connect(&at.host, at.port, &self.protection).await else {
            return Some(format!("no connection to {at}"));
        };
        info!(proxy = %at, metadata = %self.metadata, "proxy found");
        if self.found.send(push).await.is_err() {
            return None; // the registration task has ended
        }
        self.at = Some(at);
        None
    }
}

/// Time between two queries of the metadata server until a proxy is found for the first time; after that,
/// the sidecar asks less often.
const UNKNOWN: Duration = Duration::from_secs(1);
