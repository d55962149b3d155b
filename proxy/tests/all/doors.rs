//! Tests that an unknown client or sidecar at the proxy's ports cannot harm others.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use protocol::Epoch;
use protocol::registration::ToProxy;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::support::engine::{Engine, Reply, Then, events};
use crate::support::sidecar::{Role, Sidecar};
use crate::support::{PATIENCE, Rig};

const COMPLETIONS: &str = "/v1/completions";

fn prompt() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8})
}

#[tokio::test]
async fn a_registered_address_is_scheme_host_and_port_alone() {
    let rig = Rig::start(&[]).await;
    let victim = Engine::alone("victim").await;
    for tail in [
        "/secret#",
        "/secret?x=",
        "#",
        "?",
        "/secret",
        "/%2e",
        "\\secret",
    ] {
        let url = format!("{}{tail}", victim.url);
        let named = json!({"role": "decode", "url": url, "id": "d"});
        let answer = rig.client.post("/instances", &named).await;
        assert_eq!(answer.error_code(), "invalid_instance", "{url}");
        let refused = "pd_proxy_registration_messages_total{kind=\"register_refused\"}";
        let before = rig.metric(refused).await;
        let mut sidecar = Sidecar::silent("s", Role::Decode, &victim.url, &rig.registration).await;
        sidecar.register.admin = url.clone();
        sidecar
            .say(&ToProxy::Register(sidecar.register.clone()))
            .await;
        rig.until_metric(refused, before + 1.0).await;
    }
    assert_eq!(rig.client.get("/instances").await.json(), json!([]));
    assert!(victim.seen().is_empty(), "{:?}", victim.seen());
    // Without a path, the proxy accepts the victim's URL and calls the victim back, and the victim then
    // serves requests.
    let named = json!({"role": "decode", "url": format!("{}/", victim.url), "id": "d"});
    assert_eq!(rig.client.post("/instances", &named).await.status, 201);
    rig.until_state("d", "ready").await;
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
}

#[tokio::test]
async fn a_flood_of_epochs_makes_few_call_backs() {
    let rig = Rig::start(&[]).await;
    let (_d, _sidecar) = rig.instance("d", Role::Decode).await;
    // This server accepts connections and never answers.
    let victim = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = victim.local_addr().unwrap();
    let opened = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&opened);
    let held = tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = victim.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            held.push(stream);
        }
    });
    let mut flood =
        Sidecar::silent("x", Role::Decode, "http://127.0.0.1:9", &rig.registration).await;
    let began = Instant::now();
    flood.register.admin = format!("http://{at}");
    for epoch in 0..500 {
        flood.register.epoch = Epoch(1000 + epoch);
        flood.say(&ToProxy::Register(flood.register.clone())).await;
    }
    // Also register many names of one host.
    for name in 0..200 {
        flood.register.id = format!("name{name}");
        flood.say(&ToProxy::Register(flood.register.clone())).await;
    }
    let heard = "pd_proxy_registration_messages_total{kind=\"register\"}";
    rig.until_metric(heard, 700.0).await;
    let calls = opened.load(Ordering::Relaxed);
    // Sixteen call-backs to one host may be under way, and each ends after 2 s. A busy machine takes longer for the
    // flood.
    let rounds = usize::try_from(began.elapsed().as_secs() / 2 + 2).unwrap();
    assert!(
        calls <= 16 * rounds,
        "{calls} call-backs for 700 registrations of one host in {rounds} rounds"
    );
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
    held.abort();
}

/// Opens a connection and sends a request whose body never ends.
async fn half_body(address: &str, sent: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(sent.as_bytes()).await.unwrap();
    stream
}

#[tokio::test]
async fn half_sent_bodies_keep_nobody_out() {
    let rig = Rig::start(&["--max-in-flight", "4"]).await;
    let pair = rig.pair().await;
    let address = rig.client.base.strip_prefix("http://").unwrap().to_owned();
    let mut halves = Vec::new();
    for _ in 0..12 {
        halves.push(half_body(&address, "{\"prompt\": \"").await);
    }
    rig.until_metric("pd_proxy_uploads", 4.0).await;
    // A body that began a moment ago keeps its place. A body that then sends nothing for a moment loses
    // its place to the new body.
    let served = async {
        while rig.client.post(COMPLETIONS, &prompt()).await.status != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let served = timeout(PATIENCE, served).await;
    served.expect("a place beside bodies that have stopped");
    assert_eq!(pair.d.seen().len(), 1);
    rig.until_metric("pd_proxy_rejected_total{code=\"upload_displaced\"}", 8.0)
        .await;
    let mut answer = vec![0; 12];
    let read = timeout(PATIENCE, halves[0].read_exact(&mut answer)).await;
    read.expect("an answer in time").unwrap();
    assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 429");
}

#[tokio::test]
async fn open_connections_are_counted() {
    let rig = Rig::start(&[]).await;
    let address = rig.client.base.strip_prefix("http://").unwrap().to_owned();
    let mut open = Vec::new();
    for _ in 0..5 {
        open.push(TcpStream::connect(&address).await.unwrap());
    }
    rig.until_metric("pd_proxy_connections", 5.0).await;
    drop(open);
    // The client that reads the metric has a connection of its own.
    let closed = async {
        while rig.metric("pd_proxy_connections").await > 4.0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let closed = timeout(PATIENCE, closed).await;
    closed.expect("closed connections are not counted");
}

#[tokio::test]
async fn idle_connections_make_room() {
    let rig = Rig::start(&["--max-connections", "4"]).await;
    let _pair = rig.pair().await;
    let address = rig.client.base.strip_prefix("http://").unwrap().to_owned();
    let mut idle = Vec::new();
    for _ in 0..12 {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream
            .write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut start = [0; 12];
        let read = timeout(PATIENCE, stream.read_exact(&mut start)).await;
        read.expect("/health answers beside idle connections")
            .unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
        idle.push(stream);
    }
    rig.until_metric("pd_proxy_idle_connections_closed_total", 8.0)
        .await;
    let mut rest = Vec::new();
    let ended = timeout(PATIENCE, idle[0].read_to_end(&mut rest)).await;
    ended.expect("the oldest is closed").unwrap();
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
}

#[tokio::test]
async fn health_answers_while_every_connection_streams() {
    let rig = Rig::start(&["--max-connections", "3"]).await;
    let pair = rig.pair().await;
    pair.d
        .on_decode(Reply::Stream(events(&["a"])[..1].to_vec(), Then::Hang));
    let body = json!({"model": "m", "prompt": "hello", "stream": true});
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = rig.client.stream(COMPLETIONS, &body).await;
        stream.chunk().await.unwrap().unwrap();
        streams.push(stream);
    }
    for path in ["/health", "/ready", "/metrics", "/instances"] {
        let answer = timeout(PATIENCE, rig.client.get(path)).await;
        assert_eq!(answer.expect("an answer in time").status, 200, "{path}");
    }
    let refused = rig.client.post(COMPLETIONS, &prompt()).await;
    assert_eq!(
        (refused.status.as_u16(), refused.error_code().as_str()),
        (429, "too_many_connections")
    );
    assert_eq!(refused.headers["connection"], "close");
}

#[tokio::test]
async fn two_sidecars_with_one_id_are_said_and_not_used() {
    let rig = Rig::start(&["--call-back-every", "100ms"]).await;
    let (one, two) = (rig.engine("d").await, rig.engine("d").await);
    let first = Sidecar::start_as("d", 7, Role::Decode, &one.url, &rig.registration).await;
    rig.until_state("d", "ready").await;
    let mut second = Sidecar::start_as("d", 8, Role::Decode, &two.url, &rig.registration).await;
    let shown = rig
        .until("/instances", |all| {
            let all = all.as_array().unwrap();
            let told = |i: &Value| {
                let reason = i["standing"]["reason"].as_str().unwrap_or_default();
                reason.contains(&first.register.admin) && reason.contains(&second.register.admin)
            };
            all.len() == 2 && all.iter().all(told)
        })
        .await;
    assert!(shown.to_string().contains("two sidecars"), "{shown}");
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 503);
    assert!(one.seen().is_empty() && two.seen().is_empty());
    // The dispute lasts: neither sidecar replaces the other sidecar again.
    let registered = "pd_proxy_registration_messages_total{kind=\"register\"}";
    rig.until_metric(registered, rig.metric(registered).await + 10.0)
        .await;
    let all = rig.client.get("/instances").await.json();
    assert_eq!(all.as_array().unwrap().len(), 2, "{all}");
    // When one sidecar leaves, the other sidecar gets the name.
    second.leave().await;
    rig.until_state("d", "ready").await;
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
    assert_eq!((one.seen().len(), two.seen().len()), (1, 0));
}
