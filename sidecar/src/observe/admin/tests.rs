use std::time::Duration;

use axum::extract::Request;
use common::http_server::{
    HEAD_TIMEOUT, MAX_CONNECTIONS, MAX_HEAD_BYTES, OwnAddress, REQUEST_TIMEOUT,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tower::ServiceExt;

use super::*;
use crate::observe::status::tests::{config, gauges, link, record, slot_layout};
use crate::rank::context::RankRole;

struct Fixture {
    status: Arc<Status>,
    port: u16,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Fixture {
    async fn start() -> Self {
        let status = Arc::new(Status::new(&config(&[])));
        let metrics = Arc::new(Metrics::new(&status));
        let address = HostPort {
            host: "127.0.0.1".to_owned(),
            port: 0,
        };
        let admin = Admin::bind(&address, Arc::clone(&status), metrics, Readers::AllHosts)
            .await
            .unwrap();
        let (port, stop) = (admin.port(), CancellationToken::new());
        let task = tokio::spawn(admin.run(stop.clone()));
        Self {
            status,
            port,
            stop,
            task,
        }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(("127.0.0.1", self.port)).await.unwrap()
    }

    /// Sends these bytes and reads to the end of the stream.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = self.connect().await;
        // The server may already have refused the request and closed the connection.
        stream.write_all(request).await.ok();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok();
        String::from_utf8_lossy(&answer).into_owned()
    }

    async fn call(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = self.raw(request.as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").expect(&answer);
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let (code, body) = self.call("GET", path, "").await;
        (code, serde_json::from_str(&body).expect(&body))
    }

    fn call_back(&self) -> String {
        let about = self.status.about();
        json!({ "proxy": "p:8000", "id": about.id, "epoch": about.epoch }).to_string()
    }

    fn connect_engines(&self) {
        self.status.bound();
        let slot_layout = slot_layout();
        for rank in 0..2 {
            self.status
                .gauges(RankRole::Receiver, rank, &gauges(Some(&slot_layout), 1));
        }
    }
}

#[tokio::test]
async fn live_from_the_start_ready_once_a_push_would_work() {
    let f = Fixture::start().await;
    assert_eq!(f.get("/health").await, (200, json!({ "live": true })));
    let (code, body) = f.get("/ready").await;
    assert_eq!((code, &body["ready"]), (503, &json!(false)));
    assert_eq!(body["reasons"].as_array().unwrap().len(), 4, "{body}");
    f.connect_engines();
    assert_eq!(f.get("/ready").await.0, 503);
    let (code, body) = f.call("POST", "/registered", &f.call_back()).await;
    let about = f.status.about();
    let expect = json!({ "id": "d0", "epoch": about.epoch, "ready": true, "reason": "" });
    assert_eq!(
        (code, serde_json::from_str::<Value>(&body).unwrap()),
        (200, expect)
    );
    assert_eq!(
        f.get("/ready").await,
        (200, json!({ "ready": true, "reasons": [] }))
    );
    f.status.draining();
    assert_eq!(f.get("/ready").await.1["reasons"], json!(["draining"]));
    assert_eq!(f.get("/health").await.0, 200);
}

#[tokio::test]
async fn a_web_page_is_no_proxy() {
    let f = Fixture::start().await;
    f.connect_engines();
    let body = f.call_back();
    for header in [
        "Origin: http://rebound.example:7900",
        "Sec-Fetch-Site: same-origin",
    ] {
        let request = format!(
            "POST /registered HTTP/1.1\r\nHost: rebound.example:7900\r\n{header}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = f.raw(request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{header} {answer}");
    }
    assert_eq!(f.get("/ready").await.0, 503);
    assert_eq!(f.call("POST", "/registered", &body).await.0, 200);
    assert_eq!(f.get("/ready").await.0, 200);
}

#[tokio::test]
async fn a_page_that_has_rebound_its_name_reads_nothing() {
    let f = Fixture::start().await;
    for (header, expect) in [
        ("Host: rebound.example:7900", 403),
        ("Host: localhost:7900\r\nSec-Fetch-Site: cross-site", 403),
        ("Host: localhost:7900\r\nSec-Fetch-Site: none", 200),
        ("Host: 127.0.0.1:7900", 200),
        ("Host: [::1]:7900", 200),
    ] {
        for path in ["/status", "/requests"] {
            let request = format!("GET {path} HTTP/1.1\r\n{header}\r\nConnection: close\r\n\r\n");
            let answer = f.raw(request.as_bytes()).await;
            assert_eq!(
                answer[9..12],
                format!("{expect}"),
                "{path} {header} {answer}"
            );
        }
    }
}

#[tokio::test]
async fn a_call_back_for_somebody_else_is_refused_and_counts_for_nothing() {
    let f = Fixture::start().await;
    f.connect_engines();
    let epoch = f.status.about().epoch;
    for (body, expect) in [
        (
            json!({ "proxy": "p", "id": "d1", "epoch": epoch }).to_string(),
            409,
        ),
        (
            json!({ "proxy": "p", "id": "d0", "epoch": epoch.0 ^ 1 }).to_string(),
            409,
        ),
        (json!({ "proxy": "p", "id": "d0" }).to_string(), 422),
        (
            json!({ "proxy": "p", "id": "d0", "epoch": -1 }).to_string(),
            422,
        ),
        ("{".to_owned(), 400),
        (String::new(), 400),
        ("[".repeat(10_000), 422),
        (format!("\"{}\"", "x".repeat(MAX_BODY_BYTES)), 413),
    ] {
        let (code, answer) = f.call("POST", "/registered", &body).await;
        assert_eq!(code, expect, "{body:.60} {answer}");
        assert!(answer.contains("error"), "{answer}");
    }
    let plain =
        "POST /registered HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";
    assert!(f.raw(plain.as_bytes()).await.starts_with("HTTP/1.1 415"));
    assert_eq!(f.get("/ready").await.0, 503);
    let (_, metrics) = f.call("GET", "/metrics", "").await;
    assert!(
        metrics.contains("pd_sidecar_malformed_frames_total{port=\"admin\"} 7\n"),
        "{metrics}"
    );
}

#[tokio::test]
async fn shows_status_requests_and_metrics() {
    let f = Fixture::start().await;
    f.connect_engines();
    f.status.links(0, &mut [&link(7400)].into_iter());
    f.status.record(
        RankRole::Receiver,
        1,
        &record(Some(protocol::Reason::NoRoom)),
    );
    let (code, status) = f.get("/status").await;
    assert_eq!(code, 200);
    assert_eq!(
        (&status["id"], &status["role"]),
        (&json!("d0"), &json!("receiver"))
    );
    assert_eq!(status["epoch"], json!(f.status.about().epoch));
    let rank = &status["ranks"][1];
    assert_eq!(
        [&rank["free"], &rank["held"], &rank["quarantined"]],
        [13, 2, 1]
    );
    assert_eq!(rank["layout"]["chunk_tokens"], 256);
    let link = &status["links"][0];
    assert_eq!(
        [&link["configured"], &link["transport"], &link["reported"]],
        ["auto", "nixl", "cma/memory"]
    );
    assert_eq!(link["measured_gb_per_s"], 2.0);
    assert_eq!(status["proxy"]["acknowledged_ms_ago"], Value::Null);

    let (_, requests) = f.get("/requests").await;
    let row = &requests[0];
    assert_eq!(
        (&row["req"], &row["reason"], &row["rank"]),
        (&json!("r1"), &json!("no_room"), &json!(1))
    );
    assert_eq!(
        (&row["side"], &row["bytes"]),
        (&json!("receiver"), &json!(153_600))
    );

    let answer = f
        .raw(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .await;
    assert!(
        answer.contains(&format!("content-type: {}", metrics::CONTENT_TYPE)),
        "{answer}"
    );
    assert!(answer.contains("\npd_sidecar_ready 0.0\n"), "{answer}");
}

#[tokio::test]
async fn other_paths_and_garbage_get_an_answer_and_harm_nobody() {
    let f = Fixture::start().await;
    assert_eq!(f.get("/").await.0, 404);
    assert_eq!(f.call("POST", "/health", "").await.0, 405);
    assert!(
        f.raw(b"\x00\xff\x00garbage\r\n\r\n")
            .await
            .starts_with("HTTP/1.1 400")
    );
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(2 * MAX_HEAD_BYTES));
    let answer = f.raw(long.as_bytes()).await;
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
        "{answer}"
    );
    assert_eq!(f.get("/health").await.0, 200);
}

/// Opens as many silent connections as the server accepts. The server must end these connections at
/// the timeout, so that other clients can connect.
#[tokio::test(start_paused = true)]
async fn silent_clients_are_cut_off() {
    let f = Fixture::start().await;
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let mut stream = f.connect().await;
        stream.write_all(b"GET /health HT").await.unwrap();
        silent.push(stream);
    }
    let begin = tokio::time::Instant::now();
    assert_eq!(f.get("/health").await.0, 200);
    assert!(
        begin.elapsed() <= HEAD_TIMEOUT + Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
}

/// In an earlier version, silent clients that reconnected without end locked out the proxy's
/// call-back.
#[tokio::test]
async fn silent_clients_keep_nobody_out() {
    let f = Fixture::start().await;
    let mut silent = Vec::new();
    for _ in 0..2 * MAX_CONNECTIONS {
        silent.push(f.connect().await);
    }
    let answered = tokio::time::timeout(HEAD_TIMEOUT / 2, f.get("/health")).await;
    assert_eq!(answered.expect("it waited for the silent ones").0, 200);
    let mut end = Vec::new();
    silent[0].read_to_end(&mut end).await.ok();
    assert!(end.is_empty(), "the oldest was ended");
}

#[tokio::test(start_paused = true)]
async fn a_slow_body_is_cut_off() {
    let f = Fixture::start().await;
    let head = b"POST /registered HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
                 Content-Length: 100\r\n\r\n{";
    let begin = tokio::time::Instant::now();
    assert!(f.raw(head).await.starts_with("HTTP/1.1 408"));
    assert!(
        begin.elapsed() <= REQUEST_TIMEOUT + Duration::from_secs(1),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test]
async fn a_stop_closes_kept_connections() {
    let f = Fixture::start().await;
    let mut kept = f.connect().await;
    kept.write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        .await
        .unwrap();
    let mut begin = [0; 12];
    kept.read_exact(&mut begin).await.unwrap();
    f.stop.cancel();
    f.task.await.unwrap();
    let mut rest = Vec::new();
    kept.read_to_end(&mut rest).await.unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let f = Fixture::start().await;
    let address = HostPort {
        host: "127.0.0.1".to_owned(),
        port: f.port,
    };
    let metrics = Arc::new(Metrics::new(&f.status));
    let error = Admin::bind(&address, Arc::clone(&f.status), metrics, Readers::AllHosts)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains(&format!("127.0.0.1:{}", f.port)),
        "{error}"
    );
}

/// With keys, a client of another host reads no ids of requests and no addresses of peers. Probes, metrics and the proxy's
/// call-back still work.
#[tokio::test]
async fn with_keys_other_hosts_read_no_pages() {
    for (readers, from, page) in [
        (Readers::ThisHost, "10.0.0.9:1000", 403),
        (Readers::ThisHost, "127.0.0.1:1000", 200),
        (Readers::ThisHost, "[::ffff:127.0.0.1]:1000", 200),
        (Readers::ThisHost, "10.0.0.2:1000", 200),
        (Readers::AllHosts, "10.0.0.9:1000", 200),
    ] {
        let status = Arc::new(Status::new(&config(&[])));
        let metrics = Arc::new(Metrics::new(&status));
        let shared = Shared {
            status,
            metrics,
            readers,
        };
        for (path, code) in [
            ("/status", page),
            ("/requests", page),
            ("/health", 200),
            ("/metrics", 200),
        ] {
            let request = Request::builder().uri(path).header("Host", "localhost");
            let mut request = request.body(axum::body::Body::empty()).unwrap();
            let peer: SocketAddr = from.parse().unwrap();
            request.extensions_mut().insert(peer);
            let own = OwnAddress("10.0.0.2".parse().unwrap());
            request.extensions_mut().insert(own);
            let answer = router(shared.clone()).oneshot(request).await.unwrap();
            assert_eq!(answer.status().as_u16(), code, "{readers:?} {from} {path}");
        }
    }
}
