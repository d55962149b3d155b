//! Registers this sidecar and its load with the proxy, and reports the progress of requests.
//!
//! Without keys the messages go in one direction only: the proxy acknowledges a registration by an HTTP call to the admin
//! server. A proxy that proves a key also answers: it confirms the registration, or says why it does not. One task owns
//! the socket and sends all messages, so no other task waits for the proxy.
//!
//! LMCache's proxy also listens on a registration port, but it does not call back. When LMCache's proxy
//! receives a message that it does not know, it closes the port for ever, and each of its clients then waits
//! without end. Therefore, if LMCache's keys name the proxy, the task checks which of the two proxies is
//! connected before it sends a message.

mod metrics;
mod peers;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::zmq::Listener;
use futures::future::BoxFuture;
use protocol::codec;
use protocol::registration::{FromProxy, Peers, Registered, ToProxy};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::config::Config;
use crate::observe::status::Status;

use self::peers::PeerList;

pub(crate) use self::metrics::{DeliveryResult, ProxyMetrics};

/// The destination of messages to the proxy: the PUSH socket, or a list in tests.
pub(crate) trait Outlet: Send + 'static {
    /// Accepts a message, or refuses it because too many messages already wait. Never waits for room in the
    /// queue.
    ///
    /// # Errors
    /// The message is dropped.
    fn send(&mut self, payload: Vec<u8>) -> Result<(), Refused>;

    /// Returns the kind of proxy that is connected now. Waits only for the socket's own task.
    fn listener(&mut self) -> BoxFuture<'_, Listener>;

    /// Waits for the next message of the proxy. Only a proxy that has proved a key sends messages.
    fn heard(&mut self) -> BoxFuture<'_, Bytes>;

    /// Sends the queued messages for a limited time, then closes.
    fn close(self) -> BoxFuture<'static, ()>;
}

/// The error that an outlet did not accept a message.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the proxy does not take messages")]
pub(crate) struct Refused;

/// The queue through which the ranks send messages to the proxy.
#[derive(Clone, Debug)]
pub(crate) struct ProxyVoice {
    queue: mpsc::Sender<ToProxy>,
    metrics: ProxyMetrics,
}

impl ProxyVoice {
    /// Queues a message. If the queue is full, the message is dropped and counted, because a request must not
    /// wait for the proxy. The proxy can continue without the message: it sends the decode leg when the
    /// prefill leg answers.
    pub(crate) fn tell(&self, message: ToProxy) {
        let kind = kind(&message);
        if self.queue.try_send(message).is_err() {
            self.metrics.told(kind, DeliveryResult::Dropped);
        }
    }
}

/// The task that sends all messages to the proxy.
#[derive(Debug)]
pub(crate) struct Registration<O> {
    outlet: O,
    queue: mpsc::Receiver<ToProxy>,
    config: Arc<Config>,
    /// The port that the admin server bound.
    admin_port: u16,
    status: Arc<Status>,
    metrics: ProxyMetrics,
    peers: PeerList,
}

impl<O: Outlet> Registration<O> {
    /// Returns the queue for the ranks, and the task that sends the queued messages.
    pub(crate) fn new(
        outlet: O,
        config: Arc<Config>,
        admin_port: u16,
        status: Arc<Status>,
        metrics: ProxyMetrics,
    ) -> (ProxyVoice, Self) {
        let (sender, queue) = mpsc::channel(QUEUE);
        let voice = ProxyVoice {
            queue: sender,
            metrics: metrics.clone(),
        };
        let task = Self {
            outlet,
            queue,
            config,
            admin_port,
            status,
            metrics,
            peers: PeerList::default(),
        };
        (voice, task)
    }

    /// Registers at once, at every period, and when readiness changes, until `drain` is cancelled. When
    /// `drain` is cancelled, sends `Leave`, and continues to send the messages of the ranks until `stop` is
    /// cancelled or the last queue handle is dropped.
    pub(crate) async fn run(mut self, drain: CancellationToken, stop: CancellationToken) {
        let Some(proxy) = self.config.proxy.as_ref().filter(|p| !p.period.is_zero()) else {
            return; // no proxy to register with
        };
        let period = proxy.period;
        let mut ticks = tokio::time::interval(period);
        // After a stall of this process, one registration is enough, so the missed registrations are not
        // sent.
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
                // The tick comes before the queue, because a stream of messages must not delay the
                // registration.
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
                message = self.outlet.heard() => self.on_message(&message),
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

    /// Handles a message of a proxy that has proved a key.
    fn on_message(&mut self, bytes: &[u8]) {
        match codec::decode(bytes) {
            Ok(FromProxy::Registered(registered)) => self.on_registered(&registered),
            Ok(FromProxy::Peers(part)) => self.on_peers(part),
            // A newer proxy may send messages that this sidecar does not know.
            Err(error) => debug!(%error, "message of the proxy ignored"),
        }
    }

    /// Uses the peers that the proxy names, if the configuration says so.
    fn on_peers(&mut self, part: Peers) {
        let identity = self.config.identity.as_ref();
        let Some(identity) = identity.filter(|_| self.config.peers_from_proxy) else {
            return;
        };
        let learned = match self.peers.take(part) {
            Ok(None) => return,
            Ok(Some(peers)) => identity.learn(&peers).map_err(|all| all.join("; ")),
            Err(error) => Err(error),
        };
        match learned {
            Ok(count) => info!(peers = count, "the proxy has named peers"),
            Err(error) => warn!("the peers that the proxy has named are not used: {error:.512}"),
        }
    }

    /// Notes what the proxy says about this sidecar's registration.
    fn on_registered(&self, registered: &Registered) {
        let about = self.status.about();
        if registered.id != about.id || registered.epoch != about.epoch {
            return; // about an earlier process with this id
        }
        let trouble: String = registered.trouble.chars().take(MAX_TROUBLE).collect();
        let now = Instant::now();
        let news = self.status.answered(registered.confirmed, trouble, now);
        match news {
            Some(trouble) if trouble.is_empty() => info!("the proxy has confirmed this sidecar"),
            Some(trouble) => warn!("the proxy does not send requests here: {trouble}"),
            None => {}
        }
    }

    async fn register(&mut self) -> Listener {
        let now = Instant::now();
        let register = self.status.registration(&self.config, self.admin_port, now);
        self.send(&ToProxy::Register(register)).await
    }

    /// Sends a message if the connected kind of proxy accepts it. While no proxy is connected, only messages
    /// that both kinds accept are queued: the next proxy to connect may be LMCache's.
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
            warn!("cannot tell the proxy that this sidecar leaves");
        }
        self.metrics.told(kind, result);
        listener
    }

    async fn listener(&mut self) -> Listener {
        let Some(proxy) = self.config.proxy.as_ref().filter(|p| p.may_be_lmcaches) else {
            return Listener::Proxy;
        };
        let listener = self.outlet.listener().await;
        if self.status.listens_to_us(listener) {
            info!(proxy = %proxy.address, ?listener, "{}", match listener {
                Listener::Lmcache => "LMCache's proxy: it gets a notice when KV is written, and readiness does not wait for it",
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

/// Longest text of the proxy that is kept, in characters.
const MAX_TROUBLE: usize = 512;

/// Longest time between two attempts to register while the proxy is not connected yet.
const CONNECTING: Duration = Duration::from_millis(200);

/// Maximum number of messages that wait for the task: two for each request that may be in flight.
const QUEUE: usize = 4096;

#[cfg(test)]
mod tests;
