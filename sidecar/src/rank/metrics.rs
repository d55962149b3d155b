//! Counts the ended requests of all ranks, their bytes, chunks, tokens and phases, and the refused engines.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use protocol::Reason;
use protocol::record::Record;

use crate::net::malformed::MalformedFrames;
use crate::rank::role::RankRole;
use crate::transport::{Kind, table};

/// The counters and histograms of all ranks.
#[derive(Debug)]
pub(crate) struct RankMetrics {
    requests: Family<Ending, Counter>,
    bytes: Family<OnWire, Counter>,
    chunks: Family<OnWire, Counter>,
    tokens: Family<OfRank, Counter>,
    tokens_held: Family<OfRank, Counter>,
    windowed: Family<OfRank, Counter>,
    phases: Family<InPhase, Histogram, fn() -> Histogram>,
    engines_refused: Family<RefusedEngine, Counter>,
    links_lost: Family<LostLink, Counter>,
    fetches_refused: Family<LostLink, Counter>,
    /// Counters of malformed frames on the ports of the ranks and on the engine's socket.
    pub(crate) malformed: MalformedFrames,
}

/// The labels of one role of one rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OfRank {
    pub(crate) side: &'static str,
    pub(crate) rank: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ending {
    side: &'static str,
    rank: u32,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OnWire {
    side: &'static str,
    rank: u32,
    transport: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InPhase {
    side: &'static str,
    rank: u32,
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedEngine {
    side: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LostLink {
    rank: u32,
    reason: &'static str,
}

impl RankMetrics {
    /// Makes every metric. A series with known labels starts with the value 0, so that its rate is 0 and not
    /// absent. `roles` has every role of every rank.
    pub(crate) fn new(roles: &[(RankRole, u32)], malformed: MalformedFrames) -> Self {
        let phases: fn() -> Histogram = || Histogram::new(exponential_buckets(50e-6, 2.0, 19));
        let metrics = Self {
            requests: Family::default(),
            bytes: Family::default(),
            chunks: Family::default(),
            tokens: Family::default(),
            tokens_held: Family::default(),
            windowed: Family::default(),
            phases: Family::new_with_constructor(phases),
            engines_refused: Family::default(),
            links_lost: Family::default(),
            fetches_refused: Family::default(),
            malformed,
        };
        metrics.touch(roles);
        metrics
    }

    /// Registers every metric. docs/reference/metrics.md lists each metric, and a test compares that list
    /// with the registry.
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "requests",
            "Requests that have ended, by reason; ok: every wanted chunk arrived",
            self.requests.clone(),
        );
        registry.register_with_unit(
            "transferred",
            "KV that was written to receivers, or by senders",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register("chunks", "Chunks that were written", self.chunks.clone());
        registry.register("tokens", "Tokens of ended requests", self.tokens.clone());
        registry.register(
            "tokens_held",
            "Of them, tokens that the decode side held already",
            self.tokens_held.clone(),
        );
        registry.register(
            "windowed_chunks",
            "Chunks that waited for a landing slot",
            self.windowed.clone(),
        );
        registry.register_with_unit(
            "phase",
            "Time that a request spent in a phase",
            Unit::Seconds,
            self.phases.clone(),
        );
        registry.register(
            "engines_refused",
            "Engines that said hello and were refused, by reason",
            self.engines_refused.clone(),
        );
        registry.register(
            "links_lost",
            "Links to receivers that could not be made or that broke, by reason",
            self.links_lost.clone(),
        );
        registry.register(
            "fetches_refused",
            "Messages of decode sides whose token gave no KV, by reason",
            self.fetches_refused.clone(),
        );
    }

    fn touch(&self, roles: &[(RankRole, u32)]) {
        for &(role, rank) in roles {
            if role == RankRole::Sender {
                for reason in LINK_REASONS.map(Reason::as_str) {
                    drop(self.links_lost.get_or_create(&LostLink { rank, reason }));
                }
                for reason in FETCH_REASONS.map(Reason::as_str) {
                    drop(
                        self.fetches_refused
                            .get_or_create(&LostLink { rank, reason }),
                    );
                }
            }
            let side = role.as_str();
            let of_rank = OfRank { side, rank };
            drop(self.tokens.get_or_create(&of_rank));
            drop(self.tokens_held.get_or_create(&of_rank));
            drop(self.windowed.get_or_create(&of_rank));
            for reason in Reason::ALL.iter().map(|r| r.as_str()).chain([OK]) {
                drop(self.requests.get_or_create(&Ending { side, rank, reason }));
            }
            for transport in table::all().map(Kind::as_str) {
                let on_wire = OnWire {
                    side,
                    rank,
                    transport,
                };
                drop(self.bytes.get_or_create(&on_wire));
                drop(self.chunks.get_or_create(&on_wire));
            }
        }
        for side in [RankRole::Sender, RankRole::Receiver].map(RankRole::as_str) {
            for reason in [Reason::BadRequest, Reason::LayoutMismatch].map(Reason::as_str) {
                drop(
                    self.engines_refused
                        .get_or_create(&RefusedEngine { side, reason }),
                );
            }
        }
    }

    /// Counts a request that has ended.
    pub(crate) fn record(&self, role: RankRole, rank: u32, record: &Record) {
        let name = role.as_str();
        let of_rank = OfRank { side: name, rank };
        let reason = record.reason.map_or(OK, Reason::as_str);
        let ending = Ending {
            side: name,
            rank,
            reason,
        };
        self.requests.get_or_create(&ending).inc();
        self.tokens
            .get_or_create(&of_rank)
            .inc_by(record.tokens.into());
        self.tokens_held
            .get_or_create(&of_rank)
            .inc_by(record.have_tokens.into());
        self.windowed
            .get_or_create(&of_rank)
            .inc_by(record.windowed.into());
        // A request that moved no chunk may have no transport.
        if record.chunks > 0 {
            let on_wire = OnWire {
                side: name,
                rank,
                transport: wire(&record.transport),
            };
            self.bytes.get_or_create(&on_wire).inc_by(record.bytes);
            self.chunks
                .get_or_create(&on_wire)
                .inc_by(record.chunks.into());
        }
        // Each role measures only its own phases.
        let phases: &[(&'static str, u64)] = match role {
            RankRole::Sender => &[
                ("alloc", record.alloc_us),
                ("gather", record.gather_us),
                ("push", record.push_us),
            ],
            RankRole::Receiver => &[("ready", record.ready_us), ("scatter", record.scatter_us)],
        };
        for &(phase, us) in phases {
            // A phase that the request did not reach has the time 0, which would lower every quantile.
            if us > 0 {
                let labels = InPhase {
                    side: name,
                    rank,
                    phase,
                };
                self.phases.get_or_create(&labels).observe(seconds(us));
            }
        }
    }

    /// Counts a link to a receiver that could not be made or that broke.
    pub(crate) fn link_lost(&self, rank: u32, reason: Reason) {
        let reason = reason.as_str();
        self.links_lost
            .get_or_create(&LostLink { rank, reason })
            .inc();
    }

    /// Counts an answer to a decode side that cannot get the KV of its token. If the count of `not_kept` rises,
    /// a process uses old tokens or guesses tokens.
    pub(crate) fn fetch_refused(&self, rank: u32, reason: Reason) {
        let reason = reason.as_str();
        self.fetches_refused
            .get_or_create(&LostLink { rank, reason })
            .inc();
    }

    /// Counts an engine that was refused.
    pub(crate) fn engine_refused(&self, role: RankRole, reason: Reason) {
        let labels = RefusedEngine {
            side: role.as_str(),
            reason: reason.as_str(),
        };
        self.engines_refused.get_or_create(&labels).inc();
    }
}

fn wire(name: &str) -> &'static str {
    let mut names = table::all().map(Kind::as_str);
    names.find(|w| *w == name).unwrap_or("other")
}

/// Returns microseconds as seconds.
#[expect(clippy::cast_precision_loss, reason = "a time for people")]
pub(crate) fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

/// The reasons of refused fetches that exist from the start. Others appear when they occur.
const FETCH_REASONS: [Reason; 4] = [
    Reason::NotKept,
    Reason::Unclaimed,
    Reason::StaleEpoch,
    Reason::Duplicate,
];

/// The `reason` of a request that ended well.
const OK: &str = "ok";
/// The usual reasons of a lost link, which have a series from the start.
const LINK_REASONS: [Reason; 6] = [
    Reason::NoLink,
    Reason::PeerLost,
    Reason::NoEngine,
    Reason::LayoutMismatch,
    Reason::VersionMismatch,
    Reason::Draining,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_link_is_counted_by_reason() {
        let metrics = RankMetrics::new(&[(RankRole::Sender, 1)], MalformedFrames::default());
        metrics.link_lost(1, Reason::PeerLost);
        let mut registry = Registry::default();
        metrics.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for series in [
            "links_lost_total{rank=\"1\",reason=\"peer_lost\"} 1\n",
            "links_lost_total{rank=\"1\",reason=\"no_link\"} 0\n",
        ] {
            assert!(text.contains(series), "{series} is not in {text}");
        }
    }
}
