//! Tests of the registration port and of the call-back: confirmed instances get requests, and attackers
//! cannot disturb these instances.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::sidecar::{Answer, Role, Sidecar};
use crate::support::{PATIENCE, Rig};
use crate::zmtp::{Hello, greeting};

const COMPLETIONS: &str = "/v1/completions";

fn prompt() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8})
}

#[tokio::test]
async fn the_call_back_names_proxy_id_and_epoch() {
    let rig = Rig::start(&[]).await;
    let (_d, sidecar) = rig.instance("d", Role::Decode).await;
    let proxy = rig.registration.strip_prefix("tcp://").unwrap();
    let expect = json!({"proxy": proxy, "id": "d", "epoch": 7});
    assert_eq!(sidecar.calls.lock().unwrap()[..1], [expect]);
    let shown = &rig.client.get("/instances").await.json()[0];
    assert_eq!(shown["role"], "decode");
    assert_eq!(shown["slots"], 16);
    assert_eq!(shown["init_ports"], json!([7300, 7301]));
    assert_eq!(rig.client.get("/ready").await.status, 200);
}

#[tokio::test]
async fn only_a_confirmed_and_ready_instance_gets_requests() {
    for (answer, state) in [
        (Answer::Own { ready: false }, "not_ready"),
        (Answer::OtherId, "gone"),
        (Answer::OtherEpoch, "gone"),
        (Answer::Conflict, "gone"),
        (Answer::Broken, "unverified"),
    ] {
        let rig = Rig::start(&["--call-back-every", "100ms"]).await;
        let engine = rig.engine("d").await;
        let mut sidecar = Sidecar::silent("d", Role::Decode, &engine.url, &rig.registration).await;
        sidecar.answer(answer.clone());
        sidecar.beat();
        // Wait for two call-backs: a dropped instance registers again, and must be dropped again.
        let called = async {
            while sidecar.calls.lock().unwrap().len() < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, called).await.expect("it is called back");
        if state != "gone" {
            rig.until_state("d", state).await;
        }
        let refused = rig.client.post(COMPLETIONS, &prompt()).await;
        assert_eq!(refused.status, 503, "{answer:?}");
        assert_eq!(refused.headers["retry-after"], "1");
        assert_eq!(rig.client.get("/ready").await.status, 503, "{answer:?}");
        assert!(engine.seen().is_empty(), "{answer:?}");

        sidecar.answer(Answer::Own { ready: true });
        rig.until_state("d", "ready").await;
        assert_eq!(
            rig.client.post(COMPLETIONS, &prompt()).await.status,
            200,
            "{answer:?}"
        );
    }
}

#[tokio::test]
async fn an_engine_that_does_not_serve_yet_is_not_ready() {
    let rig = Rig::start(&["--call-back-every", "100ms"]).await;
    let engine = rig.engine("d").await;
    engine.set_health(503);
    let _sidecar = Sidecar::start("d", Role::Decode, &engine.url, &rig.registration).await;
    rig.until_state("d", "not_ready").await;
    let shown = rig.client.get("/instances").await.json();
    let reason = shown[0]["standing"]["reason"].as_str().unwrap();
    assert!(reason.contains("/health answers 503"), "{reason}");
    engine.set_health(200);
    rig.until_state("d", "ready").await;
}

#[tokio::test]
async fn a_sidecar_that_is_no_longer_ready_or_no_longer_itself_gets_nothing_more() {
    let rig = Rig::start(&["--call-back-every", "100ms"]).await;
    let (_d, sidecar) = rig.instance("d", Role::Decode).await;
    sidecar.answer(Answer::Own { ready: false });
    rig.until_state("d", "not_ready").await;
    sidecar.answer(Answer::Own { ready: true });
    rig.until_state("d", "ready").await;
    sidecar.answer(Answer::Conflict);
    let lost = rig.until("/instances", |all| all[0]["standing"]["state"] != "ready");
    lost.await;
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 503);
}

#[tokio::test]
async fn silence_and_good_byes_end_an_instance() {
    let rig = Rig::start(&[]).await;
    let engine = rig.engine("d").await;
    let mut sidecar = Sidecar::silent("d", Role::Decode, &engine.url, &rig.registration).await;
    sidecar.register.period_ms = 300;
    sidecar.beat();
    rig.until_state("d", "ready").await;
    sidecar.fall_silent();
    rig.until_state("d", "gone").await;
    sidecar.register.period_ms = 60_000;
    sidecar.beat();
    rig.until_state("d", "ready").await;
    sidecar.leave().await;
    rig.until_state("d", "gone").await;
    assert_eq!(
        rig.metric("pd_proxy_registration_messages_total{kind=\"leave\"}")
            .await,
        1.0
    );
}

#[tokio::test]
async fn malformed_messages_are_counted_and_nothing_else() {
    let rig = Rig::start(&[]).await;
    let (_d, sidecar) = rig.instance("d", Role::Decode).await;
    let frames: [&[&[u8]]; 7] = [
        &[b""],
        &[b"garbage"],
        &[b"\xc1"],
        &[b"\x81\xa4type\xa5Bogus"],
        &[b"\x81\xa4type\xa8Register"],
        &[b"\xdf\xff\xff\xff\xff"],
        &[b"one", b"two"],
    ];
    for frame in frames {
        sidecar.say_bytes(frame).await;
    }
    let malformed = "pd_proxy_registration_messages_total{kind=\"malformed\"}";
    rig.until_metric(malformed, 7.0).await;
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
}

#[tokio::test]
async fn strangers_on_the_registration_port_disturb_nobody() {
    let rig = Rig::start(&[]).await;
    let (_d, sidecar) = rig.instance("d", Role::Decode).await;
    let address = rig.registration_address();

    // Half-open connections, some of which have sent an incomplete greeting.
    let mut open = Vec::new();
    for i in 0..200 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        if i % 2 == 0 {
            stream.write_all(&greeting(1)[..10]).await.unwrap();
        }
        open.push(stream);
    }
    // A connection with another protocol.
    let mut http = TcpStream::connect(address).await.unwrap();
    http.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .unwrap();
    // A frame that announces 2^62 bytes.
    let mut huge = TcpStream::connect(address).await.unwrap();
    let hello = Hello::of("PUSH").bytes();
    huge.write_all(&hello).await.unwrap();
    huge.write_all(&[2, 0x40, 0, 0, 0, 0, 0, 0, 0])
        .await
        .unwrap();
    let closed = async {
        let mut rest = Vec::new();
        // The connection may end properly or by a reset.
        drop(huge.read_to_end(&mut rest).await);
    };
    timeout(PATIENCE, closed)
        .await
        .expect("the connection is closed");

    // A new instance is accepted, and the earlier instances are still registered.
    let (_p, p_sidecar) = rig.instance("p", Role::Prefill).await;
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
    sidecar.moved("unknown", 1, None).await;
    p_sidecar.progress("unknown").await;
    let stray = "pd_proxy_registration_messages_total{kind=\"stray\"}";
    rig.until_metric(stray, 2.0).await;
    drop(open);
}

#[tokio::test]
async fn a_table_that_is_full_says_so() {
    let rig = Rig::start(&["--max-instances", "1"]).await;
    let (_d, _sidecar) = rig.instance("d", Role::Decode).await;
    let _second = Sidecar::start("e", Role::Decode, "http://127.0.0.1:9", &rig.registration).await;
    let refused = "pd_proxy_registration_messages_total{kind=\"register_refused\"}";
    rig.until_metric(refused, 1.0).await;
    rig.until_state("e", "gone").await;
    rig.until_state("d", "ready").await;
}
