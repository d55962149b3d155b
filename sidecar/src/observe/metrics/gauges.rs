//! The gauges of `/metrics`, which are read from [`Status`] at each scrape.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::gauge::ConstGauge;

use crate::observe::status::{RankStatus, Snapshot, Status};
use crate::rank::metrics::{OfRank, seconds};

/// Reads the gauges at each scrape.
#[derive(Debug)]
pub(super) struct Gauges(pub(super) Arc<Status>);

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let now = Instant::now();
        let shown = self.0.snapshot(now);
        gauge(
            &mut encoder,
            "ready",
            "1 if a push would work now",
            [((), flag(shown.ready))],
        )?;
        ranks(&mut encoder, &shown)?;
        links(&mut encoder, &shown)?;
        let events = self.0.wire_events().into_iter().map(|e| {
            #[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
            let count = e.count as f64;
            let labels = OfWire {
                side: e.role.as_str(),
                rank: e.rank,
                transport: e.transport,
                event: e.event,
            };
            (Labels(labels), count)
        });
        gauge(
            &mut encoder,
            "wire_events",
            "What has happened on a wire since the start, and what it holds now",
            events,
        )?;
        let ports = self.0.ports();
        let traffic = ports.iter().flat_map(|(&(rank, port), traffic)| {
            #[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
            let of = move |(event, count): (&'static str, u64)| {
                (Labels(OfPort { rank, port, event }), count as f64)
            };
            traffic.events().map(of)
        });
        gauge(
            &mut encoder,
            "port_events",
            "What has happened on a port since the start, and the connections that it has now",
            traffic,
        )?;
        let age = shown.proxy.as_ref().and_then(|p| p.acknowledged_ms_ago);
        gauge(
            &mut encoder,
            "proxy_acknowledgement_age_seconds",
            "Time since the proxy's last call-back; absent before the first",
            age.map(|ms| ((), seconds(ms.saturating_mul(1000)))),
        )
    }
}

fn ranks(encoder: &mut DescriptorEncoder<'_>, shown: &Snapshot) -> fmt::Result {
    let of = |value: fn(&RankStatus) -> f64| {
        shown.ranks.iter().map(move |r| {
            let labels = OfRank {
                side: r.side,
                rank: r.rank,
            };
            (Labels(labels), value(r))
        })
    };
    // The states are labels of one metric, so that a query can add them up to the number of all slots.
    let states = shown.ranks.iter().flat_map(|r| {
        [
            ("free", r.free),
            ("held", r.held),
            ("quarantined", r.quarantined),
        ]
        .map(|(state, n)| {
            let labels = InState {
                side: r.side,
                rank: r.rank,
                state,
            };
            (Labels(labels), f64::from(n))
        })
    });
    gauge(encoder, "slots", "Slots of the buffer, by state", states)?;
    #[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
    {
        gauge(
            encoder,
            "slot_bytes",
            "Bytes of a slot",
            of(|r| r.slot_bytes as f64),
        )?;
        gauge(
            encoder,
            "requests_under_way",
            "Requests under way",
            of(|r| f64::from(r.requests)),
        )?;
        gauge(
            encoder,
            "parked_tokens",
            "Tokens of decode requests that are parked",
            of(|r| r.parked_tokens as f64),
        )?;
        gauge(
            encoder,
            "kept_requests",
            "Requests whose KV a prefill engine keeps until a decode side fetches it",
            of(|r| f64::from(r.kept)),
        )?;
        gauge(
            encoder,
            "kept_tokens",
            "Tokens of requests whose KV a prefill engine keeps",
            of(|r| r.kept_tokens as f64),
        )?;
        gauge(
            encoder,
            "expected_requests",
            "Decode requests whose KV a prefill side keeps",
            of(|r| f64::from(r.expected)),
        )?;
        gauge(
            encoder,
            "engine_connections",
            "Engines connected",
            of(|r| r.engines as f64),
        )
    }
}

fn links(encoder: &mut DescriptorEncoder<'_>, shown: &Snapshot) -> fmt::Result {
    #[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
    let count = shown.links.len() as f64;
    gauge(encoder, "links", "Links to receivers", [((), count)])?;
    let first = || shown.links.iter().take(MAX_LINKS);
    let infos = first().map(|l| {
        let labels = OfLink {
            rank: l.rank,
            peer: label(&l.peer),
            configured: l.configured,
            transport: l.transport,
            reported: label(&l.reported),
        };
        (Labels(labels), 1.0)
    });
    gauge(
        encoder,
        "link_info",
        "1 for each link: the wire configured and chosen, and its library's word on itself",
        infos,
    )?;
    let rates = first().filter_map(|l| {
        let labels = Measured {
            rank: l.rank,
            peer: label(&l.peer),
            transport: l.transport,
        };
        Some((Labels(labels), l.measured_gb_per_s? * 1e9))
    });
    gauge(
        encoder,
        "link_measured_bytes_per_second",
        "Speed of recent writes over a link",
        rates,
    )
}

/// Labels of one series; `()` means no labels.
trait Series {
    fn encode(&self, encoder: &mut MetricEncoder<'_>, value: f64) -> fmt::Result;
}

struct Labels<L>(L);

impl<L: EncodeLabelSet> Series for Labels<L> {
    fn encode(&self, encoder: &mut MetricEncoder<'_>, value: f64) -> fmt::Result {
        ConstGauge::new(value).encode(encoder.encode_family(&self.0)?)
    }
}

impl Series for () {
    fn encode(&self, encoder: &mut MetricEncoder<'_>, value: f64) -> fmt::Result {
        encoder.encode_gauge(&value)
    }
}

fn gauge<S: Series>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    series: impl IntoIterator<Item = (S, f64)>,
) -> fmt::Result {
    let kind = ConstGauge::new(0.0).metric_type();
    let mut encoder = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in series {
        labels.encode(&mut encoder, value)?;
    }
    Ok(())
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InState {
    side: &'static str,
    rank: u32,
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfWire {
    side: &'static str,
    rank: u32,
    transport: &'static str,
    event: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfPort {
    rank: u32,
    port: &'static str,
    event: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfLink {
    rank: u32,
    peer: String,
    configured: &'static str,
    transport: &'static str,
    reported: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Measured {
    rank: u32,
    peer: String,
    transport: &'static str,
}

/// Replaces the special characters in a label value that came from a peer. prometheus-client 0.23 does not
/// escape values, so a peer could otherwise forge series with a quote or a line break in a host name.
fn label(text: &str) -> String {
    let safe = |c: char| !c.is_control() && c != '"' && c != '\\';
    text.chars()
        .take(MAX_LABEL_CHARS)
        .map(|c| if safe(c) { c } else { '_' })
        .collect()
}

fn flag(on: bool) -> f64 {
    f64::from(u8::from(on))
}

/// Largest number of links that are shown one by one, so that a scrape stays small in a large fleet.
pub(super) const MAX_LINKS: usize = 64;

/// Longest label value. UCX reports a long list of devices and protocols, and its beginning is enough for a
/// label.
const MAX_LABEL_CHARS: usize = 80;
