use std::path::PathBuf;

use protocol::local::Target;
use protocol::registration::InstanceRole;
use protocol::{Layout, Reason, RequestId};
use serde_json::json;

use super::*;
use crate::config::Inputs;
use crate::engine::sessions::SlotLayout;

/// Returns the configuration of a receiver with two ranks and a proxy. `more` has flags that change the
/// configuration.
pub(crate) fn config(more: &[(&'static str, &str)]) -> Config {
    let file = "\
pd_role: receiver
pd_buffer_size: 1GiB
pd_peer_host: 127.0.0.1
pd_peer_init_port: [7300, 7301]
pd_peer_alloc_port: [7400, 7401]
pd_proxy_host: 127.0.0.1
pd_proxy_port: 7500
sidecar: {id: d0, register_ms: 50}
";
    let inputs = Inputs {
        flags: more.iter().map(|(f, v)| (*f, (*v).to_owned())).collect(),
        file: Some((PathBuf::from("x.yaml"), file.to_owned())),
        hostname: "host".to_owned(),
        ..Inputs::default()
    };
    let (config, _) = Config::load(&inputs).unwrap_or_else(|r| panic!("{}", r.errors()));
    config
}

pub(crate) fn slot_layout() -> SlotLayout {
    SlotLayout {
        layout: Layout {
            model: "m".to_owned(),
            dtype: "float".to_owned(),
            layers: 2,
            kv_heads: 2,
            head_size: 8,
            mla: false,
            chunk_tokens: 256,
            ..Layout::example()
        },
        slots: 16,
        slot_bytes: 65536,
        epoch: Epoch(9),
    }
}

pub(crate) fn gauges(slot_layout: Option<&SlotLayout>, engines: usize) -> Gauges<'_> {
    Gauges {
        slot_layout,
        engines,
        unmoved: None,
        free: if slot_layout.is_some() { 13 } else { 0 },
        held: if slot_layout.is_some() { 2 } else { 0 },
        quarantined: u32::from(slot_layout.is_some()),
        parked_tokens: 700,
        requests: 3,
        kept: 4,
        kept_tokens: 900,
        expected: 5,
    }
}

fn target(port: u16) -> Target {
    Target {
        host: "10.0.0.2".to_owned(),
        init_port: 1,
        alloc_port: port,
    }
}

pub(crate) fn link(port: u16) -> LinkStatus {
    let mut link = LinkStatus::new(&target(port), "auto");
    link.transport = "nixl";
    link.reported = "cma/memory".to_owned();
    let began = Instant::now();
    link.measured(2_000_000, began, began + Duration::from_millis(1));
    link
}

pub(crate) fn record(reason: Option<Reason>) -> Record {
    Record {
        req: RequestId::from("r1"),
        peer: "10.0.0.2:7400".to_owned(),
        reason,
        tokens: 600,
        have_tokens: 64,
        chunks: 3,
        bytes: 153_600,
        transport: "nixl".to_owned(),
        alloc_us: 150,
        gather_us: 400,
        push_us: 900,
        ready_us: 2_000,
        scatter_us: 300,
        windowed: 1,
    }
}

fn reasons(status: &Status, now: Instant) -> Vec<String> {
    status
        .obstacles(now)
        .iter()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn the_rate_of_a_wire_is_that_of_writes_together() {
    let start = Instant::now() + Duration::from_secs(1);
    let mut link = LinkStatus::new(&target(1), "auto");
    // The writes begin at the same time and end one after the other.
    for ms in 1..=8 {
        link.measured(1_000_000, start, start + Duration::from_millis(ms));
    }
    let rate = link.rate().unwrap();
    assert!((rate - 1.0).abs() < 1e-6, "{rate} GB/s");
    assert_eq!(link.large_rate(), None);
    // A small write is reported before the large write that began earlier and ends later.
    let at = |ms: u64| start + Duration::from_millis(1000 + ms);
    let mut link = LinkStatus::new(&target(1), "auto");
    link.measured(1, at(94), at(95));
    link.measured(100 << 20, at(0), at(100));
    let large = link.large_rate().unwrap();
    assert!((1.0..1.07).contains(&large), "{large} GB/s");
}

#[test]
fn ready_only_when_a_push_would_work() {
    let now = Instant::now();
    let status = Status::new(&config(&[]));
    let no_proxy = "the proxy at 127.0.0.1:7500 has not acknowledged this sidecar within 15 s";
    let no_engine = |rank| format!("no engine is connected to the receiver of rank {rank}");
    let starting = "ports are not bound yet".to_owned();
    assert_eq!(
        reasons(&status, now),
        [starting, no_engine(0), no_engine(1), no_proxy.to_owned()]
    );
    status.bound();
    let slot_layout = slot_layout();
    for rank in 0..2 {
        status.gauges(RankRole::Receiver, rank, &gauges(Some(&slot_layout), 1));
    }
    assert_eq!(reasons(&status, now), [no_proxy]);
    status.acknowledged("p", now);
    assert_eq!(reasons(&status, now), [""; 0]);
    assert_eq!(reasons(&status, now + ACKNOWLEDGED_FOR), [""; 0]);
    assert_eq!(
        reasons(&status, now + ACKNOWLEDGED_FOR + Duration::from_millis(1)),
        [no_proxy]
    );
    status.gauges(RankRole::Receiver, 1, &gauges(Some(&slot_layout), 0));
    assert_eq!(reasons(&status, now), [no_engine(1)]);
    status.draining();
    assert_eq!(reasons(&status, now)[0], "draining");
}

#[test]
fn both_sides_need_an_engine_and_without_a_proxy_nobody_needs_to_call() {
    let mut config = config(&[("--role", "both")]);
    config.proxy = None;
    let status = Status::new(&config);
    status.bound();
    assert_eq!(status.about().roles.len(), 4);
    for (side, rank) in status.about().roles.clone() {
        assert!(!status.obstacles(Instant::now()).is_empty());
        status.gauges(side, rank, &gauges(None, 1));
    }
    assert_eq!(reasons(&status, Instant::now()), [""; 0]);
}

#[test]
fn a_registration_carries_load_and_does_not_wait_for_its_own_acknowledgement() {
    let now = Instant::now();
    let config = config(&[]);
    let status = Status::new(&config);
    assert!(!status.registration(&config, 7900, now).ready);
    status.bound();
    let slot_layout = slot_layout();
    for rank in 0..2 {
        status.gauges(RankRole::Receiver, rank, &gauges(Some(&slot_layout), 1));
    }
    let register = status.registration(&config, 7901, now);
    assert_eq!(
        register,
        Register {
            id: "d0".to_owned(),
            epoch: status.about().epoch,
            role: InstanceRole::Decode,
            http: "http://127.0.0.1:8200".to_owned(),
            admin: "http://127.0.0.1:7901".to_owned(),
            host: "127.0.0.1".to_owned(),
            init_ports: vec![7300, 7301],
            alloc_ports: vec![7400, 7401],
            ready: true,
            slots: 32,
            free_slots: 26,
            parked_tokens: 1400,
            period_ms: 50,
            ranks: 2,
            layout: Some(slot_layout.layout.clone()),
            unmoved: String::new(),
            release: env!("CARGO_PKG_VERSION").to_owned(),
            ..Register::example()
        }
    );
    status.draining();
    assert!(!status.registration(&config, 7901, now).ready);
    assert_ne!(Status::new(&config).about().epoch, register.epoch);
}

#[test]
fn an_engine_that_moves_nothing_keeps_its_sidecar_ready_and_the_proxy_is_told_why() {
    let now = Instant::now();
    let config = config(&[]);
    let status = Status::new(&config);
    status.bound();
    status.acknowledged("p", now);
    for rank in 0..2 {
        let unmoved = Some("heads of two sizes");
        let gauges = Gauges {
            unmoved,
            ..gauges(None, 1)
        };
        status.gauges(RankRole::Receiver, rank, &gauges);
    }
    assert_eq!(reasons(&status, now), [""; 0]);
    let register = status.registration(&config, 7900, now);
    assert_eq!(
        (register.ready, register.unmoved.as_str(), register.layout),
        (true, "heads of two sizes", None)
    );
    let snapshot = status.snapshot(now);
    assert_eq!(
        (snapshot.ready, snapshot.unmoved.as_deref()),
        (true, Some("heads of two sizes"))
    );
    // Now an engine that moves KV connects.
    let slot_layout = slot_layout();
    for rank in 0..2 {
        status.gauges(RankRole::Receiver, rank, &gauges(Some(&slot_layout), 1));
    }
    let register = status.registration(&config, 7900, now);
    assert_eq!(
        (register.unmoved.as_str(), register.layout),
        ("", Some(slot_layout.layout))
    );
    assert_eq!(status.snapshot(now).unmoved, None);
}

#[test]
fn links_are_replaced_by_what_there_is() {
    let status = Status::new(&config(&[("--role", "sender")]));
    let shown = |status: &Status| {
        let links = status.snapshot(Instant::now()).links;
        links
            .iter()
            .map(|l| format!("{} {:?}", l.peer, l.measured_gb_per_s))
            .collect::<Vec<_>>()
    };
    let (a, mut b) = (link(1), link(2));
    status.links(0, &mut [&a, &b].into_iter());
    assert_eq!(
        shown(&status),
        ["10.0.0.2:1 Some(2.0)", "10.0.0.2:2 Some(2.0)"]
    );
    let began = Instant::now() + Duration::from_secs(1);
    b.measured(9_000_000, began, began + Duration::from_millis(1));
    status.links(0, &mut std::iter::once(&b));
    assert_eq!(shown(&status).len(), 1);
    assert!(
        shown(&status)[0].starts_with("10.0.0.2:2 Some(5."),
        "{:?}",
        shown(&status)
    );
    status.links(0, &mut std::iter::empty());
    assert_eq!(shown(&status).len(), 0);
}

#[test]
fn the_oldest_records_give_way() {
    let status = Status::new(&config(&[]));
    for i in 0..MAX_RECORDS + 10 {
        let req = RequestId(format!("r{i}"));
        status.record(
            RankRole::Receiver,
            0,
            &Record {
                req,
                ..record(None)
            },
        );
    }
    let names = names(&status, Instant::now());
    assert_eq!(names.len(), MAX_RECORDS);
    assert_eq!(names[0], "r10");
    assert_eq!(names[MAX_RECORDS - 1], format!("r{}", MAX_RECORDS + 9));
}

#[test]
fn kept_requests_come_after_those_that_have_ended_longest_kept_first() {
    let status = Status::new(&config(&[]));
    let now = Instant::now();
    let kept = |req: &str, s| KeptStatus {
        req: RequestId::from(req),
        tokens: 600,
        since: now + Duration::from_secs(s),
    };
    status.kept(0, &mut [kept("p2", 2), kept("p1", 1)].into_iter());
    status.record(RankRole::Sender, 0, &record(None));
    assert_eq!(names(&status, now), ["r1", "p1", "p2"]);
    let rows = serde_json::to_value(status.requests(now + Duration::from_secs(4))).unwrap();
    let row = json!({ "side": "sender", "rank": 0, "req": "p1", "tokens": 600, "kept_ms": 3000 });
    assert_eq!(rows[1], row);
    status.kept(0, &mut std::iter::empty());
    assert_eq!(names(&status, now), ["r1"]);
}

fn names(status: &Status, now: Instant) -> Vec<String> {
    let rows = status.requests(now).into_iter();
    let name = |row| match row {
        RequestRow::Ended(row) => row.record.req.0,
        RequestRow::Kept(row) => row.req.0,
    };
    rows.map(name).collect()
}

#[tokio::test]
async fn only_what_readiness_depends_on_wakes_the_registration() {
    let status = Status::new(&config(&[]));
    let slot_layout = slot_layout();
    status.bound();
    status.changed().await;
    status.gauges(RankRole::Receiver, 0, &gauges(Some(&slot_layout), 1));
    status.changed().await;
    status.gauges(RankRole::Receiver, 0, &gauges(Some(&slot_layout), 2));
    status.record(RankRole::Receiver, 0, &record(None));
    let quiet = tokio::time::timeout(Duration::from_millis(20), status.changed()).await;
    assert!(quiet.is_err());
    status.draining();
    status.changed().await;
}

/// A stranger can send a call-back. So with keys only the proxy's answers on the registration channel count.
#[test]
fn with_keys_the_proxys_answers_count_and_not_its_call_backs() {
    use common::identity::keygen;

    let folder = tempfile::tempdir().unwrap();
    let (key, roster) = (folder.path().join("key"), folder.path().join("roster"));
    let public = keygen(&key).unwrap();
    std::fs::write(
        &roster,
        format!("{public}: {{name: d0, roles: [receiver]}}\n"),
    )
    .unwrap();
    let shown = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let (key, roster) = (shown(&key), shown(&roster));
    for (auth, counts) in [("prefer", true), ("require", false)] {
        let status = Status::new(&config(&[
            ("--auth", auth),
            ("--key-file", &key),
            ("--roster", &roster),
        ]));
        let now = Instant::now();
        let obstacle = || {
            let all = reasons(&status, now).into_iter();
            all.filter(|reason| reason.contains("has not acknowledged"))
                .collect::<Vec<_>>()
        };
        assert_eq!(obstacle().len(), 1);
        status.acknowledged("p", now);
        assert_eq!(obstacle().is_empty(), counts, "{auth}");
        if counts {
            continue;
        }
        // The first answer comes before the first call-back, and says nothing.
        assert_eq!(status.answered(false, String::new(), now), None);
        let refusal = || "registration refused: no such host".to_owned();
        assert_eq!(status.answered(false, refusal(), now), Some(refusal()));
        assert_eq!(status.answered(false, refusal(), now), None, "told once");
        assert!(obstacle()[0].ends_with(&refusal()), "{:?}", obstacle());
        assert_eq!(status.snapshot(now).proxy.unwrap().trouble, Some(refusal()));
        assert_eq!(
            status.answered(true, String::new(), now),
            Some(String::new())
        );
        assert_eq!(obstacle(), [""; 0]);
        let proxy = status.snapshot(now).proxy.unwrap();
        assert_eq!((proxy.trouble, proxy.name.as_str()), (None, "p"));
        assert!(status.snapshot(now).channels.iter().any(|channel| {
            channel.name == "alloc"
                && channel
                    .protection
                    .contains("a key of the roster with the role sender")
        }));
    }
}
