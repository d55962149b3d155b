//! Tests of the proxy's limits, and of the ways in which it stops.

use std::time::Duration;

use proxy::End;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::client::Whole;
use crate::support::engine::{Reply, Then, completion, events};
use crate::support::sidecar::Role;
use crate::support::{PATIENCE, Rig};

const COMPLETIONS: &str = "/v1/completions";

fn prompt() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8})
}

fn streamed() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8, "stream": true})
}

#[tokio::test]
async fn refusals_have_openais_shape() {
    let rig = Rig::start(&["--max-body-bytes", "1000"]).await;
    let refused = |answer: Whole, status: u16, code: &str| {
        assert_eq!(answer.status, status, "{}", answer.text());
        assert_eq!(answer.headers["content-type"], "application/json");
        let error = &answer.json()["error"];
        assert_eq!(error["code"], code, "{error}");
        assert!(
            error["message"].is_string() && error["type"].is_string(),
            "{error}"
        );
    };
    let client = &rig.client;
    refused(
        client.post(COMPLETIONS, &prompt()).await,
        503,
        "no_decode_instance",
    );
    refused(client.get("/v1/models").await, 503, "no_decode_instance");
    refused(client.get("/v1/unheard-of").await, 404, "not_found");
    refused(client.get(COMPLETIONS).await, 405, "method_not_allowed");
    refused(
        client.post("/metrics", &json!({})).await,
        405,
        "method_not_allowed",
    );

    let _pair = rig.pair().await;
    refused(
        client.post_with(COMPLETIONS, &[], "nonsense").await,
        400,
        "invalid_json",
    );
    refused(
        client.post(COMPLETIONS, &json!([])).await,
        400,
        "invalid_json",
    );
    // Only the proxy may set transfer parameters.
    let forged = json!({"prompt": "x", "kv_transfer_params": {"do_remote_prefill": true}});
    refused(
        client.post(COMPLETIONS, &forged).await,
        400,
        "kv_transfer_params_not_allowed",
    );
    let long = json!({"prompt": "x".repeat(2000)});
    refused(client.post(COMPLETIONS, &long).await, 413, "body_too_large");
    assert_eq!(
        rig.metric("pd_proxy_rejected_total{code=\"body_too_large\"}")
            .await,
        1.0
    );
    assert!(rig.journal.lines().is_empty(), "no leg was sent");
}

#[tokio::test]
async fn the_list_of_models_is_a_decode_instances() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let headers = [("authorization", "Bearer secret")];
    let answer = rig
        .client
        .open(http::Method::GET, "/v1/models", &headers, Vec::new().into())
        .await
        .whole()
        .await;
    assert_eq!(answer.json()["data"][0]["id"], "m");
    assert_eq!(pair.d.only().headers["authorization"], "Bearer secret");
    assert!(pair.p.seen().is_empty());
}

#[tokio::test]
async fn headers_are_passed_on_and_the_id_is_made_safe() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let headers = [
        ("x-request-id", "my id/1"),
        ("authorization", "Bearer secret"),
        ("x-tenant", "t"),
        ("connection", "x-secret-hop, keep-alive"),
        ("x-secret-hop", "1"),
        ("accept-encoding", "gzip"),
    ];
    let answer = rig
        .client
        .post_with(COMPLETIONS, &headers, prompt().to_string())
        .await;
    let id = answer.headers["x-request-id"].to_str().unwrap().to_owned();
    assert!(
        id.starts_with("myid1-") && id.len() == "myid1-".len() + 8,
        "{id}"
    );
    for leg in [pair.p.only(), pair.d.only()] {
        assert_eq!(leg.id(), id);
        assert_eq!(leg.headers["authorization"], "Bearer secret");
        assert_eq!(leg.headers["x-tenant"], "t");
        assert_eq!(leg.headers["content-type"], "application/json");
        for gone in ["x-secret-hop", "accept-encoding", "connection"] {
            assert!(!leg.headers.contains_key(gone), "{gone}: {:?}", leg.headers);
        }
    }
}

#[tokio::test]
async fn requests_that_cannot_be_split_go_to_the_decode_instance_alone() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let mut sent = 0;
    for (fields, why) in [
        (json!({"prompt": "a", "best_of": 2}), "many_sequences"),
        (
            json!({"prompt": "a", "prompt_logprobs": 1}),
            "prompt_logprobs",
        ),
    ] {
        assert_eq!(rig.client.post(COMPLETIONS, &fields).await.status, 200);
        sent += 1;
        assert_eq!(pair.d.seen().len(), sent);
        assert_eq!(pair.d.seen()[sent - 1].text, fields.to_string());
        let sample = format!("pd_proxy_alone_total{{reason=\"{why}\"}}");
        assert_eq!(rig.metric(&sample).await, 1.0, "{why}");
    }
    assert!(pair.p.seen().is_empty());
}

#[tokio::test]
async fn a_full_proxy_says_so() {
    let rig = Rig::start(&["--max-in-flight", "1"]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Held(200, completion("x", 5, 1)));
    let client = rig.client.clone();
    let first = tokio::spawn(async move { client.post(COMPLETIONS, &prompt()).await });
    rig.journal.until("p prefill").await;
    let second = rig.client.post(COMPLETIONS, &prompt()).await;
    assert_eq!(
        (second.status.as_u16(), second.error_code().as_str()),
        (429, "too_many_requests")
    );
    assert_eq!(second.headers["retry-after"], "1");
    pair.p.release();
    assert_eq!(first.await.unwrap().status, 200);
    pair.p.release();
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
}

#[tokio::test]
async fn slow_clients_are_given_up_on() {
    let rig = Rig::start(&["--client-timeout", "1s"]).await;
    let pair = rig.pair().await;
    let address = rig.client.base.strip_prefix("http://").unwrap().to_owned();
    let closed = async |sent: &[u8]| {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(sent).await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE, stream.read_to_end(&mut answer))
            .await
            .expect("the connection is closed")
            .unwrap();
        String::from_utf8(answer).unwrap()
    };
    // A head that does not end holds its place only until the timeout.
    let answer = closed(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n").await;
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
        "{answer}"
    );
    // A body that does not end holds its place only until the timeout.
    for path in [COMPLETIONS, "/instances"] {
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: 100\r\n\r\n{{"
        );
        let answer = closed(head.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 408") && answer.contains("body_timeout"),
            "{answer}"
        );
    }
    assert!(pair.p.seen().is_empty());

    // An answer that the client does not read holds its legs only until the timeout.
    let flood = vec!["data: x\n\n".repeat(100_000); 100];
    pair.d.on_decode(Reply::Stream(flood, Then::Hang));
    let body = streamed().to_string();
    let mut stream = TcpStream::connect(&address).await.unwrap();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    rig.journal.until("d decode aborted").await;
    assert_eq!(rig.record().await["outcome"], "client_left");
    drop(stream);
}

#[tokio::test]
async fn tokens_of_a_stream_are_known_with_include_usage() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let mut chunks = events(&["a", "b"]);
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 6, "completion_tokens": 2}});
    chunks.insert(2, format!("data: {usage}\n\n"));
    pair.d.on_decode(Reply::Stream(chunks.clone(), Then::End));
    let answer = rig.client.post(COMPLETIONS, &streamed()).await;
    assert_eq!(answer.text(), chunks.concat());
    let record = rig.record().await;
    assert_eq!(record["prompt_tokens"], 6, "{record}");
    assert_eq!(record["completion_tokens"], 2, "{record}");
    assert_eq!(record["stream"], true, "{record}");
}

#[tokio::test]
async fn draining_lets_requests_finish() {
    let mut rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Held(200, completion("x", 5, 1)));
    let client = rig.client.clone();
    let asked = tokio::spawn(async move { client.post(COMPLETIONS, &prompt()).await });
    rig.journal.until("p prefill").await;
    rig.stop.drain.cancel();
    rig.until("/ready", |ready| ready["ready"] == false).await;
    let ready = rig.client.get("/ready").await;
    assert_eq!(
        (ready.status.as_u16(), &ready.json()["reasons"][0]),
        (503, &json!("draining"))
    );
    assert_eq!(rig.client.get("/health").await.status, 200);
    let refused = rig.client.post(COMPLETIONS, &prompt()).await;
    assert_eq!(
        (refused.status.as_u16(), refused.error_code().as_str()),
        (503, "draining")
    );
    pair.p.release();
    assert_eq!(asked.await.unwrap().status, 200);
    assert_eq!(rig.ended().await, End::Drained);
    let gone = TcpStream::connect(rig.client.base.strip_prefix("http://").unwrap()).await;
    assert!(gone.is_err(), "the port is closed");
}

#[tokio::test]
async fn what_does_not_finish_in_time_is_cut_off_with_a_word() {
    let mut rig = Rig::start(&["--drain-timeout", "300ms"]).await;
    let pair = rig.pair().await;
    pair.d
        .on_decode(Reply::Stream(events(&["a"])[..1].to_vec(), Then::Hang));
    let mut stream = rig.client.stream(COMPLETIONS, &streamed()).await;
    stream.chunk().await.unwrap().unwrap();
    pair.d.on_decode(Reply::Silence);
    let client = rig.client.clone();
    let waiting = tokio::spawn(async move { client.post(COMPLETIONS, &prompt()).await });
    let second_leg = async {
        while pair.d.seen().len() < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, second_leg)
        .await
        .expect("both are under way");
    rig.stop.drain.cancel();
    let rest = stream.whole().await;
    assert!(
        rest.complete && rest.text().contains("shutting_down"),
        "{}",
        rest.text()
    );
    let waited = waiting.await.unwrap();
    assert_eq!(
        (waited.status.as_u16(), waited.error_code().as_str()),
        (503, "shutting_down")
    );
    assert_eq!(rig.ended().await, End::ForcedShutdown);
}

#[tokio::test]
async fn a_second_word_stops_at_once() {
    let mut rig = Rig::start(&["--drain-timeout", "1h"]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Silence);
    let client = rig.client.clone();
    let waiting = tokio::spawn(async move { client.post(COMPLETIONS, &prompt()).await });
    rig.journal.until("p prefill").await;
    rig.stop.drain.cancel();
    rig.stop.now.cancel();
    assert_eq!(waiting.await.unwrap().error_code(), "shutting_down");
    assert_eq!(rig.ended().await, End::ForcedShutdown);
    rig.journal.until("p prefill aborted").await;
}

#[tokio::test]
async fn an_idle_proxy_stops_at_once() {
    let rig = Rig::start(&["--drain-timeout", "1h"]).await;
    let _d = rig.instance("d", Role::Decode).await;
    assert_eq!(rig.end().await, End::Drained);
}

#[tokio::test]
async fn connections_have_a_limit_and_are_served_in_turn() {
    let rig = Rig::start(&["--max-connections", "1", "--client-timeout", "1s"]).await;
    let address = rig.client.base.strip_prefix("http://").unwrap().to_owned();
    // A silent connection takes the only place. The next connection is served nevertheless.
    let idle = TcpStream::connect(&address).await.unwrap();
    assert_eq!(rig.client.get("/health").await.status, 200);
    drop(idle);
}

#[tokio::test]
async fn an_upload_that_goes_on_is_not_cut() {
    let rig = Rig::start(&["--client-timeout", "3s"]).await;
    let _pair = rig.pair().await;
    let address = rig.client.base.strip_prefix("http://").unwrap();
    let body = json!({"prompt": "x".repeat(20_000)}).to_string();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    for piece in body.as_bytes().chunks(2048) {
        stream.write_all(piece).await.unwrap();
        // The pauses together are longer than the time for which a client may be silent.
        tokio::time::sleep(Duration::from_millis(450)).await;
    }
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    timeout(PATIENCE, read).await.expect("an answer").unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn an_upload_in_drops_is() {
    let rig = Rig::start(&["--client-timeout", "400ms"]).await;
    let address = rig.client.base.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n";
    stream.write_all(head).await.unwrap();
    let (mut from, mut to) = stream.into_split();
    let drops = async {
        while to.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let mut answer = String::new();
    let read = async {
        tokio::select! {
            () = drops => unreachable!("the answer comes before the connection's end"),
            read = from.read_to_string(&mut answer) => drop(read),
        }
    };
    timeout(PATIENCE, read).await.expect("an answer");
    assert!(answer.contains("body_timeout"), "{answer}");
}
