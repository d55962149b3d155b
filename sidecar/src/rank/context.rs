//! Holds what both roles of a rank share: the context, the clock, and the observer that shows their state.

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::zmq::Traffic;
use protocol::local::Target;
use protocol::record::Record;
use protocol::registration::ToProxy;
use protocol::{RequestId, Time};
use tracing::{info, warn};

use crate::config::Config;
use crate::engine::sessions::SlotLayout;
use crate::rank::metrics::RankMetrics;
use crate::rank::recorder::Trace;
pub(crate) use crate::rank::role::RankRole;
use crate::transport::expected_rate::{ExpectedRate, Watch};
use crate::transport::set::Wires;

/// The objects that the task of one rank uses: configuration, wires, trace, observer and metrics.
#[derive(Clone, Debug)]
pub(crate) struct RankContext {
    pub(crate) config: Arc<Config>,
    pub(crate) rank: u32,
    pub(crate) wires: Wires,
    pub(crate) trace: Trace,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) metrics: Arc<RankMetrics>,
}

/// Receives every change of a rank's state and shows it on the admin server and to the proxy.
pub(crate) trait Observer: Send + Sync + std::fmt::Debug {
    /// Receives the record of a request that has ended.
    fn record(&self, role: RankRole, rank: u32, record: &Record);
    /// Receives the state after an event.
    fn gauges(&self, role: RankRole, rank: u32, gauges: Gauges<'_>);
    /// Receives the wires of a role. The observer reads their event counts when metrics are requested.
    fn wires(&self, role: RankRole, rank: u32, wires: Wires);
    /// Receives a port that was bound. The observer reads its event counts when metrics are requested.
    fn port(&self, rank: u32, port: &'static str, traffic: Traffic);
    /// Takes all requests whose KV a sender's engine keeps, after one was added or removed.
    fn kept(&self, rank: u32, requests: &mut dyn Iterator<Item = KeptStatus>);
    /// Receives the state of a sender's links.
    fn links(&self, rank: u32, links: &mut dyn Iterator<Item = &LinkStatus>);
    /// Sends the message to the proxy, if there is a proxy.
    fn tell_proxy(&self, message: &ToProxy);
}

/// The state of one rank's role: its engines, slots and requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gauges<'a> {
    pub(crate) slot_layout: Option<&'a SlotLayout>,
    pub(crate) engines: usize,
    /// The reason why the engine moves no KV; `None` if it moves KV.
    pub(crate) unmoved: Option<&'a str>,
    pub(crate) free: u32,
    pub(crate) held: u32,
    pub(crate) quarantined: u32,
    pub(crate) parked_tokens: u64,
    pub(crate) requests: u32,
    /// Number of requests whose KV the engine keeps until a decode side fetches it; 0 for a receiver.
    pub(crate) kept: u32,
    /// Tokens of these requests; 0 for a receiver.
    pub(crate) kept_tokens: u64,
    /// Number of decode requests whose KV a prefill side keeps; 0 for a sender.
    pub(crate) expected: u32,
}

/// A request whose KV the prefill engine keeps until a decode side fetches it.
#[derive(Clone, Debug)]
pub(crate) struct KeptStatus {
    /// The id of the request at the prefill engine.
    pub(crate) req: RequestId,
    pub(crate) tokens: u32,
    /// The time of the engine's last step for the request.
    pub(crate) since: Instant,
}

/// The state of one link of a sender, for logs and the status page: configured, reported and measured values.
#[derive(Clone, Debug)]
pub(crate) struct LinkStatus {
    /// The receiver, as `host:alloc_port`.
    pub(crate) peer: String,
    /// The receiver's name; empty until the handshake.
    pub(crate) id: String,
    /// The configured transport: `auto`, `nixl` or `tcp`.
    pub(crate) configured: &'static str,
    /// The wire that was chosen; empty until the handshake.
    pub(crate) transport: &'static str,
    /// The reason for the choice of the wire; empty until the handshake.
    pub(crate) why: String,
    /// The library's own report, empty until the handshake. For NIXL, this is `UCX_TLS` and UCX's estimate of
    /// the rate. UCX may use another wire than both suggest.
    pub(crate) reported: String,
    /// Bytes and seconds of recent writes; older writes have less weight. `None` before the first write.
    recent: Option<(f64, f64)>,
    /// Bytes and seconds of recent large writes only. A small write takes only a little longer than its
    /// posting, so it does not show the wire's rate.
    large: Option<(f64, f64)>,
    /// The start and the end of the latest period in which at least one write was always in flight; `None`
    /// before the first write.
    busy: Option<(Instant, Instant)>,
    /// The minimum rate to expect from the chosen wire; `None` until the handshake.
    pub(crate) expected_rate: Option<ExpectedRate>,
    watch: Watch,
}

/// Each write multiplies the weight of all earlier writes in the measured rate by this factor.
const FADE: f64 = 0.9;

/// Minimum bytes of a large write, which shows the wire's rate.
const LARGE: u64 = 16 << 20;

impl LinkStatus {
    pub(crate) fn new(to: &Target, configured: &'static str) -> Self {
        Self {
            peer: format!("{}:{}", to.host, to.alloc_port),
            id: String::new(),
            configured,
            transport: "",
            why: String::new(),
            reported: String::new(),
            recent: None,
            large: None,
            busy: None,
            expected_rate: None,
            watch: Watch::default(),
        }
    }

    /// Adds a write to the measured rate. If several writes are in flight at the same time, that time counts
    /// once, so that the result is the rate of the wire and not of one write.
    pub(crate) fn measured(&mut self, bytes: u64, began: Instant, ended: Instant) {
        let took = match self.busy {
            Some((from, until)) if began <= until && from <= ended => {
                self.busy = Some((from.min(began), until.max(ended)));
                from.saturating_duration_since(began) + ended.saturating_duration_since(until)
            }
            before => {
                self.busy = before.max(Some((began, ended)));
                ended.saturating_duration_since(began)
            }
        };
        fade_in(&mut self.recent, bytes, took);
        if bytes >= LARGE {
            fade_in(&mut self.large, bytes, took);
        }
    }

    /// Logs a warning if recent writes are far slower than this wire should be.
    pub(crate) fn judge(&mut self, bytes: u64) {
        let (Some(expected), rate) = (self.expected_rate, self.rate()) else {
            return;
        };
        if let Some(hint) = self.watch.note(expected, bytes, rate, Instant::now()) {
            warn!(
                peer = self.peer,
                transport = self.transport,
                reported = self.reported,
                measured_gb_per_s = rate,
                least_gb_per_s = expected.least_gb_s,
                "a transport is far slower than expected: {hint}"
            );
        }
    }

    /// Returns the rate of recent writes in GB/s (10⁹); `None` before the first write.
    pub(crate) fn rate(&self) -> Option<f64> {
        gb_per_s(self.recent)
    }

    /// Returns the rate of recent large writes in GB/s (10⁹); `None` before the first large write.
    pub(crate) fn large_rate(&self) -> Option<f64> {
        gb_per_s(self.large)
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn fade_in(sums: &mut Option<(f64, f64)>, bytes: u64, took: Duration) {
    let (past_bytes, past_seconds) = sums.unwrap_or_default();
    *sums = Some((
        past_bytes * FADE + bytes as f64,
        past_seconds * FADE + took.as_secs_f64(),
    ));
}

fn gb_per_s(sums: Option<(f64, f64)>) -> Option<f64> {
    sums.filter(|(_, seconds)| *seconds > 0.0)
        .map(|(bytes, seconds)| bytes / seconds / 1e9)
}

impl RankContext {
    pub(crate) fn record(&self, role: RankRole, record: &Record) {
        let rate = |us: u64| {
            // Bytes per microsecond are MB/s.
            record.bytes.checked_div(us).unwrap_or_default()
        };
        if let Some(reason) = record.reason {
            warn!(
                side = role.as_str(), req = %record.req, peer = record.peer, %reason,
                tokens = record.tokens, chunks = record.chunks, bytes = record.bytes,
                "request ended early"
            );
        } else {
            // The line has the numbers that users of LMCache search for: tokens, milliseconds, GB/s.
            let (verb, us) = match role {
                RankRole::Sender => ("Stored", record.push_us),
                RankRole::Receiver => ("Received", record.ready_us),
            };
            let moved = record.tokens - record.have_tokens.min(record.tokens);
            let done = format!(
                "request done: {verb} {moved} out of total {} tokens, cost {:.3} ms, throughput: {:.3} GB/s, \
                 {} chunks",
                record.tokens,
                us as f64 / 1e3,
                // If KV arrives before its decode request, the request does not wait for KV, so there is no
                // rate.
                if us > 0 {
                    record.bytes as f64 / us as f64 / 1e3
                } else {
                    0.0
                },
                record.chunks,
            );
            info!(
                side = role.as_str(), req = %record.req, peer = record.peer,
                tokens = record.tokens, have_tokens = record.have_tokens,
                chunks = record.chunks, bytes = record.bytes, transport = record.transport,
                alloc_us = record.alloc_us, gather_us = record.gather_us,
                push_us = record.push_us, push_mb_s = rate(record.push_us),
                ready_us = record.ready_us, scatter_us = record.scatter_us,
                "{done}"
            );
        }
        self.metrics.record(role, self.rank, record);
        self.observer.record(role, self.rank, record);
    }

    pub(crate) fn publish<'a>(
        &self,
        role: RankRole,
        gauges: Gauges<'_>,
        mut links: impl Iterator<Item = &'a LinkStatus>,
    ) {
        self.observer.gauges(role, self.rank, gauges);
        if role == RankRole::Sender {
            self.observer.links(self.rank, &mut links);
        }
    }

    pub(crate) fn malformed(&self, port: &'static str) {
        self.metrics.malformed.count(port);
    }
}

/// The clock of the protocol machines: microseconds since the start of a role.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self {
            start: Instant::now(),
        }
    }

    pub(crate) fn now(&self) -> Time {
        Time(u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    /// Returns the time of an instant; 0 for an instant before the start.
    pub(crate) fn at(&self, instant: Instant) -> Time {
        let since = instant.saturating_duration_since(self.start);
        Time(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }

    /// Returns the instant of a time.
    pub(crate) fn instant(&self, time: Time) -> Instant {
        self.start + Duration::from_micros(time.0)
    }

    /// Completes at `deadline`; never if there is no deadline.
    pub(crate) async fn sleep_until(&self, deadline: Option<Time>) {
        match deadline {
            // Tokio's timers have a granularity of a millisecond and never fire early, so the machine wakes
            // only once for each deadline.
            Some(Time(us)) => {
                let at = self.instant(Time(us));
                tokio::time::sleep_until(at.into()).await;
            }
            None => std::future::pending().await,
        }
    }
}
