//! Tells the proxy that this sidecar is here, with its load, and what happens to requests.
//!
//! One way: the proxy acknowledges by calling back the admin server. Everything goes through one
//! task that owns the socket; whoever has something to say never waits for it.
//!
//! LMCache's proxy listens on such a port too. It calls nobody back, and closes the port for good at a
//! message that it does not know, so that each of its clients waits without end. Where LMCache's keys name
//! the proxy, the task therefore looks first which of the two is connected.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use protocol::codec;
use protocol::registration::ToProxy;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Config;
use crate::net::zmq::Listener;
use crate::observe::metrics::{DeliveryResult, Metrics};
use crate::observe::status::Status;

/// Where the proxy's messages go: the PUSH socket, or a list in tests.
pub(crate) trait Outlet: Send + 'static {
    /// Takes a message, or refuses it because too many wait already. Never waits.
    ///
    /// # Errors
    /// The message is dropped.
    fn send(&mut self, payload: Vec<u8>) -> Result<(), Refused>;

    /// Returns the kind of proxy that is connected now. Waits for the socket's own task alone.
    fn listener(&mut self) -> BoxFuture<'_, Listener>;

    /// Flushes for a bounded time and closes.
    fn close(self) -> BoxFuture<'static, ()>;
}

/// An outlet did not take a message.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the proxy does not take messages")]
pub(crate) struct Refused;

/// What the sides speak through.
#[derive(Clone, Debug)]
pub(crate) struct ProxyVoice {
    queue: mpsc::Sender<ToProxy>,
    metrics: Arc<Metrics>,
}

impl ProxyVoice {
    /// Queues a message; if the queue is full it is dropped and counted, because a request must not
    /// wait for the proxy. The proxy sends the decode leg when the prefill leg answers, with or
    /// without our word.
    pub(crate) fn tell(&self, message: ToProxy) {
        let kind = kind(&message);
        if self.queue.try_send(message).is_err() {
            self.metrics.told_proxy(kind, DeliveryResult::Dropped);
        }
    }
}

/// The task's state. See the module.
#[derive(Debug)]
pub(crate) struct Registration<O> {
    outlet: O,
    queue: mpsc::Receiver<ToProxy>,
    config: Arc<Config>,
    /// The admin server's port, as it was bound.
    admin_port: u16,
    status: Arc<Status>,
    metrics: Arc<Metrics>,
}

impl<O: Outlet> Registration<O> {
    /// A voice, and the task that carries it.
    pub(crate) fn new(
        outlet: O,
        config: Arc<Config>,
        admin_port: u16,
        status: Arc<Status>,
        metrics: Arc<Metrics>,
    ) -> (ProxyVoice, Self) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let voice = ProxyVoice {
            queue: sender,
            metrics: Arc::clone(&metrics),
        };
        let task = Self {
            outlet,
            queue,
            config,
            admin_port,
            status,
            metrics,
        };
        (voice, task)
    }

    /// Registers at once, at every period, and when readiness changes, until `drain`: then leaves, but
    /// still carries what the sides say, until `stop` or the last voice is gone.
    pub(crate) async fn run(mut self, drain: CancellationToken, stop: CancellationToken) {
        let Some(proxy) = self.config.proxy.as_ref().filter(|p| !p.period.is_zero()) else {
            return; // nobody to register with
        };
        let period = proxy.period;
        let mut ticks = tokio::time::interval(period);
        // After a stall one registration is enough.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut leaving = false;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                () = drain.cancelled(), if !leaving => {
                    leaving = true;
                    info!("leaving the proxy");
                    self.send(&ToProxy::Leave(self.status.leave())).await;
                }
                // Before the queue: a stream of messages must not keep the heartbeat back.
                _ = ticks.tick(), if !leaving => {
                    if self.register().await == Listener::Nobody {
                        ticks.reset_after(period.min(CONNECTING));
                    }
                }
                () = self.status.changed(), if !leaving => {
                    self.register().await;
                }
                message = self.queue.recv() => match message {
                    Some(message) => {
                        self.send(&message).await;
                    }
                    None => break,
                },
            }
        }
        while let Ok(message) = self.queue.try_recv() {
            self.send(&message).await;
        }
        if !leaving {
            self.send(&ToProxy::Leave(self.status.leave())).await;
        }
        self.outlet.close().await;
    }

    async fn register(&mut self) -> Listener {
        let now = Instant::now();
        let register = self.status.registration(&self.config, self.admin_port, now);
        self.send(&ToProxy::Register(register)).await
    }

    /// Sends a message, unless only the other kind of proxy takes it. What waits for a proxy that is away
    /// reaches the one that comes, which may be LMCache's.
    async fn send(&mut self, message: &ToProxy) -> Listener {
        let kind = kind(message);
        let listener = self.listener().await;
        let is_taken = listener == Listener::Proxy || kind == "proxy_notif";
        if listener == Listener::Lmcache && !is_taken {
            return listener;
        }
        let result = match is_taken && self.outlet.send(codec::encode(message)).is_ok() {
            true => DeliveryResult::Sent,
            false => DeliveryResult::Dropped,
        };
        if result == DeliveryResult::Dropped && kind == "leave" {
            warn!("the proxy was not told that this sidecar leaves");
        }
        self.metrics.told_proxy(kind, result);
        listener
    }

    async fn listener(&mut self) -> Listener {
        let Some(proxy) = self.config.proxy.as_ref().filter(|p| p.may_be_lmcaches) else {
            return Listener::Proxy;
        };
        let listener = self.outlet.listener().await;
        if self.status.listens_to_us(listener) {
            info!(proxy = %proxy.address, ?listener, "{}", match listener {
                Listener::Lmcache => "LMCache's proxy: it hears when KV is written, and readiness does not wait for it",
                _ => "a proxy that takes registrations",
            });
        }
        listener
    }
}

fn kind(message: &ToProxy) -> &'static str {
    match message {
        ToProxy::Register(_) => "register",
        ToProxy::Leave(_) => "leave",
        ToProxy::Progress(_) => "progress",
        ToProxy::ProxyNotif(_) => "proxy_notif",
    }
}

/// Time between two looks at a proxy that is not connected yet.
const CONNECTING: Duration = Duration::from_millis(200);

/// Messages that may wait for the task: two a request, for every request that may be under way.
const QUEUE: usize = 4096;

#[cfg(test)]
mod tests;
