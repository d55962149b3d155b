//! The surroundings that both roles of a rank share: context, clock, and the observer that makes their state visible.

use std::sync::Arc;
use std::time::{Duration, Instant};

use protocol::local::Target;
use protocol::record::Record;
use protocol::registration::ToProxy;
use protocol::{Reason, Time};
use tracing::{info, warn};

use crate::config::Config;
use crate::engine::sessions::SlotLayout;
use crate::net::zmq::Traffic;
use crate::rank::recorder::Trace;
use crate::transport::expected_rate::{ExpectedRate, Watch};
use crate::transport::set::Wires;

/// The role of one rank in a transfer. A process of the role `both` has two of them for each rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum RankRole {
    /// Pushes KV.
    Sender,
    /// Receives KV.
    Receiver,
}

impl RankRole {
    /// The name in metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Sender => "sender",
            Self::Receiver => "receiver",
        }
    }
}

/// The surroundings of one rank's task.
#[derive(Clone, Debug)]
pub(crate) struct RankContext {
    pub(crate) config: Arc<Config>,
    pub(crate) rank: u32,
    pub(crate) wires: Wires,
    pub(crate) trace: Trace,
    pub(crate) observer: Arc<dyn Observer>,
}

/// Takes every change of the state of a rank, to show it: in metrics, at the admin server, to the proxy.
pub(crate) trait Observer: Send + Sync + std::fmt::Debug {
    /// A request has ended.
    fn record(&self, side: RankRole, rank: u32, record: &Record);
    /// The state after an event.
    fn gauges(&self, side: RankRole, rank: u32, gauges: Gauges<'_>);
    /// The wires of a side, whose events are read when somebody asks.
    fn wires(&self, side: RankRole, rank: u32, wires: Wires);
    /// A port that was bound, whose events are read when somebody asks.
    fn port(&self, rank: u32, port: &'static str, traffic: Traffic);
    /// The links of a sender.
    fn links(&self, rank: u32, links: &mut dyn Iterator<Item = &LinkStatus>);
    /// A frame that was no message came to this port.
    fn malformed(&self, port: &'static str);
    /// An engine that said hello to this side was refused.
    fn engine_refused(&self, side: RankRole, reason: Reason);
    /// Tells the proxy, if there is one.
    fn tell_proxy(&self, message: &ToProxy);
}

/// What a side holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gauges<'a> {
    pub(crate) slot_layout: Option<&'a SlotLayout>,
    pub(crate) engines: usize,
    /// Why the engine moves no KV, if it does not.
    pub(crate) unmoved: Option<&'a str>,
    pub(crate) free: u32,
    pub(crate) held: u32,
    pub(crate) quarantined: u32,
    pub(crate) parked_tokens: u64,
    pub(crate) requests: u32,
}

/// One link of a sender, for people: what was configured, what the library reports, what was measured.
#[derive(Clone, Debug)]
pub(crate) struct LinkStatus {
    /// `host:alloc_port`.
    pub(crate) peer: String,
    /// The receiver's name; empty until the handshake.
    pub(crate) id: String,
    /// As configured: `auto`, `nixl`, `tcp`.
    pub(crate) configured: &'static str,
    /// The wire that was chosen; empty until then.
    pub(crate) transport: &'static str,
    /// Why that one.
    pub(crate) why: String,
    /// The library's word on itself: of NIXL `UCX_TLS` and UCX's estimate, not the wire in use.
    pub(crate) reported: String,
    /// Bytes and time of recent writes: older ones fade.
    recent: Option<(f64, f64)>,
    /// The same of large ones alone: small ones are as long as their posting.
    large: Option<(f64, f64)>,
    /// From when to when the last of them were under way.
    busy: Option<(Instant, Instant)>,
    /// What the chosen wire should give; absent until then.
    pub(crate) class: Option<ExpectedRate>,
    watch: Watch,
}

/// The weight of the past in the measured rate, per write.
const FADE: f64 = 0.9;

/// Bytes of a write that shows what its wire can do.
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
            class: None,
            watch: Watch::default(),
        }
    }

    /// Notes a write. Time that it shared with others counts once, so that the rate is the wire's.
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

    /// Says so if recent writes are far slower than this wire should be.
    pub(crate) fn judge(&mut self, bytes: u64) {
        let (Some(class), rate) = (self.class, self.rate()) else {
            return;
        };
        if let Some(hint) = self.watch.note(class, bytes, rate, Instant::now()) {
            warn!(
                peer = self.peer,
                transport = self.transport,
                reported = self.reported,
                measured_gb_per_s = rate,
                least_gb_per_s = class.least_gb_s,
                "a wire is far below its class: {hint}"
            );
        }
    }

    /// GB/s (10⁹) of recent writes.
    pub(crate) fn rate(&self) -> Option<f64> {
        gb_per_s(self.recent)
    }

    /// The same of large ones.
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
    pub(crate) fn record(&self, side: RankRole, record: &Record) {
        let rate = |us: u64| {
            // Bytes per microsecond are MB/s.
            record.bytes.checked_div(us).unwrap_or_default()
        };
        if let Some(reason) = record.reason {
            warn!(
                side = side.as_str(), req = %record.req, peer = record.peer, %reason,
                tokens = record.tokens, chunks = record.chunks, bytes = record.bytes,
                "request ended early"
            );
        } else {
            // What people of LMCache look for: tokens, milliseconds, GB/s.
            let (verb, us) = match side {
                RankRole::Sender => ("Stored", record.push_us),
                RankRole::Receiver => ("Received", record.ready_us),
            };
            let moved = record.tokens - record.have_tokens.min(record.tokens);
            let done = format!(
                "request done: {verb} {moved} out of total {} tokens, cost {:.3} ms, throughput: {:.3} GB/s, \
                 {} chunks",
                record.tokens,
                us as f64 / 1e3,
                // KV that was here before its decode request took no time of it, and has no speed.
                if us > 0 {
                    record.bytes as f64 / us as f64 / 1e3
                } else {
                    0.0
                },
                record.chunks,
            );
            info!(
                side = side.as_str(), req = %record.req, peer = record.peer,
                tokens = record.tokens, have_tokens = record.have_tokens,
                chunks = record.chunks, bytes = record.bytes, transport = record.transport,
                alloc_us = record.alloc_us, gather_us = record.gather_us,
                push_us = record.push_us, push_mb_s = rate(record.push_us),
                ready_us = record.ready_us, scatter_us = record.scatter_us,
                "{done}"
            );
        }
        self.observer.record(side, self.rank, record);
    }

    pub(crate) fn publish<'a>(
        &self,
        side: RankRole,
        gauges: Gauges<'_>,
        mut links: impl Iterator<Item = &'a LinkStatus>,
    ) {
        self.observer.gauges(side, self.rank, gauges);
        if side == RankRole::Sender {
            self.observer.links(self.rank, &mut links);
        }
    }

    pub(crate) fn malformed(&self, port: &'static str) {
        self.observer.malformed(port);
    }
}

/// The machines' clock.
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

    /// The time of an instant since the start.
    pub(crate) fn at(&self, instant: Instant) -> Time {
        let since = instant.saturating_duration_since(self.start);
        Time(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }

    /// Completes at `deadline`; never if there is none.
    pub(crate) async fn sleep_until(&self, deadline: Option<Time>) {
        match deadline {
            // Timers have a granularity of a millisecond; never early, or the machine is asked twice.
            Some(Time(us)) => {
                let at = self.start + Duration::from_micros(us);
                tokio::time::sleep_until(at.into()).await;
            }
            None => std::future::pending().await,
        }
    }
}
