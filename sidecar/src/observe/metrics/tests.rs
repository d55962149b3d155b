use common::zmq::Traffic;

use crate::memory::Buffer;
use crate::rank::context::RankRole;
use crate::transport::set::Wires;
use crate::transport::tcp::{self, Tcp};
use std::collections::BTreeMap;

use std::time::Instant;

use super::gauges::MAX_LINKS;
use protocol::Reason;
use protocol::record::Record;

use super::*;
use crate::observe::registration::DeliveryResult;
use crate::observe::status::tests::{config, gauges, link, record, slot_layout};

fn metrics(role: &str) -> (Arc<Status>, Metrics) {
    let status = Arc::new(Status::new(&config(&[("--role", role)])));
    let metrics = Metrics::new(&status);
    (status, metrics)
}

/// Returns the values by series, without the comment lines.
fn series(metrics: &Metrics) -> BTreeMap<String, f64> {
    let text = metrics.text();
    assert!(text.ends_with("# EOF\n"));
    text.lines()
        .filter(|l| !l.starts_with('#'))
        .map(|l| {
            let (name, value) = l.rsplit_once(' ').expect(l);
            (name.to_owned(), value.parse().expect(l))
        })
        .collect()
}

#[test]
fn a_request_is_counted_everywhere_it_belongs() {
    let (_, metrics) = metrics("both");
    metrics.ranks.record(RankRole::Sender, 1, &record(None));
    metrics
        .ranks
        .record(RankRole::Receiver, 0, &record(Some(Reason::NoRoom)));
    let nothing = Record {
        chunks: 0,
        bytes: 0,
        push_us: 0,
        transport: String::new(),
        ..record(Some(Reason::Busy))
    };
    metrics.ranks.record(RankRole::Sender, 1, &nothing);
    let series = series(&metrics);
    for (name, value) in [
        (
            "pd_sidecar_requests_total{side=\"sender\",rank=\"1\",reason=\"ok\"}",
            1.0,
        ),
        (
            "pd_sidecar_requests_total{side=\"sender\",rank=\"1\",reason=\"busy\"}",
            1.0,
        ),
        (
            "pd_sidecar_requests_total{side=\"receiver\",rank=\"0\",reason=\"no_room\"}",
            1.0,
        ),
        (
            "pd_sidecar_requests_total{side=\"receiver\",rank=\"1\",reason=\"no_room\"}",
            0.0,
        ),
        (
            "pd_sidecar_transferred_bytes_total{side=\"sender\",rank=\"1\",transport=\"nixl\"}",
            153_600.0,
        ),
        (
            "pd_sidecar_transferred_bytes_total{side=\"sender\",rank=\"1\",transport=\"tcp\"}",
            0.0,
        ),
        (
            "pd_sidecar_chunks_total{side=\"sender\",rank=\"1\",transport=\"nixl\"}",
            3.0,
        ),
        (
            "pd_sidecar_tokens_total{side=\"sender\",rank=\"1\"}",
            1200.0,
        ),
        (
            "pd_sidecar_tokens_held_total{side=\"sender\",rank=\"1\"}",
            128.0,
        ),
        (
            "pd_sidecar_windowed_chunks_total{side=\"receiver\",rank=\"0\"}",
            1.0,
        ),
        (
            "pd_sidecar_phase_seconds_count{side=\"sender\",rank=\"1\",phase=\"push\"}",
            1.0,
        ),
        (
            "pd_sidecar_phase_seconds_sum{side=\"sender\",rank=\"1\",phase=\"push\"}",
            0.0009,
        ),
        (
            "pd_sidecar_phase_seconds_count{side=\"sender\",rank=\"1\",phase=\"alloc\"}",
            2.0,
        ),
        (
            "pd_sidecar_phase_seconds_count{side=\"receiver\",rank=\"0\",phase=\"scatter\"}",
            1.0,
        ),
    ] {
        assert_eq!(series.get(name), Some(&value), "{name}");
    }
    assert!(!series.contains_key(
        "pd_sidecar_phase_seconds_count{side=\"receiver\",rank=\"0\",phase=\"push\"}"
    ));
}

#[test]
fn gauges_are_what_the_status_says() {
    let (status, metrics) = metrics("both");
    let before = series(&metrics);
    assert_eq!(before["pd_sidecar_ready"], 0.0);
    assert!(!before.contains_key("pd_sidecar_proxy_acknowledgement_age_seconds"));
    let slot_layout = slot_layout();
    status.gauges(RankRole::Receiver, 1, &gauges(Some(&slot_layout), 2));
    status.links(0, &mut [&link(1)].into_iter());
    status.acknowledged("p", Instant::now());
    let series = series(&metrics);
    for (name, value) in [
        (
            "pd_sidecar_slots{side=\"receiver\",rank=\"1\",state=\"free\"}",
            13.0,
        ),
        (
            "pd_sidecar_slots{side=\"receiver\",rank=\"1\",state=\"held\"}",
            2.0,
        ),
        (
            "pd_sidecar_slots{side=\"receiver\",rank=\"1\",state=\"quarantined\"}",
            1.0,
        ),
        (
            "pd_sidecar_slots{side=\"sender\",rank=\"0\",state=\"free\"}",
            0.0,
        ),
        (
            "pd_sidecar_slot_bytes{side=\"receiver\",rank=\"1\"}",
            65536.0,
        ),
        (
            "pd_sidecar_parked_tokens{side=\"receiver\",rank=\"1\"}",
            700.0,
        ),
        (
            "pd_sidecar_kept_requests{side=\"receiver\",rank=\"1\"}",
            4.0,
        ),
        (
            "pd_sidecar_kept_tokens{side=\"receiver\",rank=\"1\"}",
            900.0,
        ),
        (
            "pd_sidecar_expected_requests{side=\"receiver\",rank=\"1\"}",
            5.0,
        ),
        (
            "pd_sidecar_requests_under_way{side=\"receiver\",rank=\"1\"}",
            3.0,
        ),
        (
            "pd_sidecar_engine_connections{side=\"receiver\",rank=\"1\"}",
            2.0,
        ),
        ("pd_sidecar_links", 1.0),
        (
            "pd_sidecar_link_info{rank=\"0\",peer=\"10.0.0.2:1\",configured=\"auto\",transport=\"nixl\",reported=\"cma/memory\"}",
            1.0,
        ),
        (
            "pd_sidecar_link_measured_bytes_per_second{rank=\"0\",peer=\"10.0.0.2:1\",transport=\"nixl\"}",
            2e9,
        ),
    ] {
        assert_eq!(series.get(name), Some(&value), "{name}");
    }
    assert!(series["pd_sidecar_proxy_acknowledgement_age_seconds"] < 5.0);
}

/// A large fleet of receivers, or a hostile proxy that invents receivers, must not make a scrape grow without
/// limit.
#[test]
fn labels_are_bounded() {
    let (status, metrics) = metrics("sender");
    let mut links: Vec<_> = (0..200).map(link).collect();
    links[0].reported = "x\"\n".repeat(1000);
    links[1].peer = "h\"} 1\nforged{a=\"\\".to_owned();
    status.links(0, &mut links.iter());
    metrics.ranks.record(
        RankRole::Sender,
        0,
        &Record {
            transport: "pigeon".to_owned(),
            ..record(None)
        },
    );
    let series = series(&metrics);
    assert_eq!(series["pd_sidecar_links"], 200.0);
    let shown = series
        .keys()
        .filter(|k| k.starts_with("pd_sidecar_link_info"))
        .count();
    assert_eq!(shown, MAX_LINKS);
    assert!(series.keys().all(|k| k.len() < 400));
    assert!(
        series
            .keys()
            .any(|k| k.contains("peer=\"h_} 1_forged{a=__\""))
    );
    assert!(series.keys().any(|k| k.contains("transport=\"other\"")));
}

#[test]
fn messages_and_frames_are_counted() {
    let (_, metrics) = metrics("sender");
    metrics.malformed.count("alloc");
    metrics.proxy.told("register", DeliveryResult::Sent);
    metrics.proxy.told("progress", DeliveryResult::Dropped);
    metrics.proxy.acknowledged();
    metrics
        .ranks
        .engine_refused(RankRole::Receiver, Reason::LayoutMismatch);
    let series = series(&metrics);
    for (name, value) in [
        (
            "pd_sidecar_engines_refused_total{side=\"receiver\",reason=\"layout_mismatch\"}",
            1.0,
        ),
        (
            "pd_sidecar_engines_refused_total{side=\"sender\",reason=\"bad_request\"}",
            0.0,
        ),
        (
            "pd_sidecar_chunks_total{side=\"sender\",rank=\"0\",transport=\"cuda_ipc\"}",
            0.0,
        ),
        ("pd_sidecar_malformed_frames_total{port=\"alloc\"}", 1.0),
        ("pd_sidecar_malformed_frames_total{port=\"init\"}", 0.0),
        (
            "pd_sidecar_proxy_messages_total{kind=\"register\",fate=\"sent\"}",
            1.0,
        ),
        (
            "pd_sidecar_proxy_messages_total{kind=\"progress\",fate=\"dropped\"}",
            1.0,
        ),
        ("pd_sidecar_proxy_acknowledgements_total", 1.0),
    ] {
        assert_eq!(series.get(name), Some(&value), "{name}");
    }
}

/// docs/reference/metrics.md has every metric with its type and labels, and no other metric; docs/reference/reasons.md
/// has every reason.
#[test]
fn docs_list_every_metric() {
    let (status, metrics) = metrics("both");
    metrics.ranks.record(RankRole::Sender, 0, &record(None));
    metrics.proxy.told("register", DeliveryResult::Sent);
    status.links(0, &mut [&link(1)].into_iter());
    status.acknowledged("p", Instant::now());
    let buffer = Buffer::memfd("metrics-test", 1 << 20).unwrap();
    let tcp = Tcp::bind(tcp::Config::default(), buffer).unwrap();
    status.wires(RankRole::Receiver, 0, Wires::of(vec![Arc::new(tcp)]));
    status.port(0, "init", Traffic::default());
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/metrics.md");
    let docs = std::fs::read_to_string(path).unwrap();
    let mut listed: Vec<String> = docs
        .lines()
        .filter(|l| l.starts_with("| `pd_sidecar_"))
        .map(|l| {
            let cells: Vec<_> = l.split('|').map(str::trim).collect();
            format!("{} {} {}", cells[1], cells[2], cells[3])
        })
        .collect();
    listed.sort();
    let text = metrics.text();
    let mut expected = Vec::new();
    for line in text.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        let suffix = match kind {
            "counter" => "_total",
            "info" => "_info",
            _ => "",
        };
        let first = text
            .lines()
            .find(|l| {
                let rest = l.strip_prefix(name).unwrap_or("?");
                // Skips the series of another metric with a longer name that begins with this name.
                let rest = rest
                    .strip_prefix(suffix)
                    .unwrap_or(rest)
                    .trim_start_matches("_bucket");
                rest.starts_with(['{', ' '])
            })
            .unwrap_or_else(|| panic!("{name} has no series"));
        let labels: Vec<_> = first
            .split_once('{')
            .map_or("", |(_, rest)| rest)
            .split("\",")
            .filter_map(|pair| {
                pair.split_once("=\"")
                    .map(|(label, _)| format!("`{label}`"))
            })
            .filter(|l| l != "`le`")
            .collect();
        let labels = if labels.is_empty() {
            "–".to_owned()
        } else {
            labels.join(" ")
        };
        expected.push(format!("`{name}{suffix}` {kind} {labels}"));
    }
    expected.sort();
    assert_eq!(
        listed, expected,
        "docs/reference/metrics.md and the code differ"
    );
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/reasons.md");
    let reasons = std::fs::read_to_string(path).unwrap();
    for reason in Reason::ALL {
        assert!(
            reasons.contains(&format!("`{}`", reason.as_str())),
            "docs/reference/reasons.md lacks {reason}"
        );
    }
}
