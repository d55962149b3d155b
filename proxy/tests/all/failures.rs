//! Tests of engines that die, refuse or fall silent, and of clients that leave: every request ends, and its
//! other legs are dropped.

use serde_json::{Value, json};

use crate::support::engine::{Reply, Then, completion, events};
use crate::support::sidecar::Role;
use crate::support::{Pair, Rig};

const COMPLETIONS: &str = "/v1/completions";

fn prompt() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8})
}

fn streamed() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8, "stream": true})
}

fn error_of(message: &str) -> Value {
    json!({"error": {"message": message, "type": "BadRequestError", "code": 400}})
}

#[tokio::test]
async fn prefill_failures_become_local_compute() {
    let check = async |reply: Reply, why: &str| {
        let rig = Rig::start(&["--prefill-timeout", "300ms"]).await;
        let pair = rig.pair().await;
        pair.p.on_prefill(reply);
        let answer = rig.client.post(COMPLETIONS, &prompt()).await;
        assert_eq!(answer.json()["choices"][0]["text"], "hello", "{why}");
        // The decode engine gets the client's body unchanged.
        assert_eq!(pair.d.only().text, prompt().to_string(), "{why}");
        let record = rig.record().await;
        assert_eq!(record["alone"], why, "{record}");
        assert_eq!(record["outcome"], "done", "{record}");
        let sample = format!("pd_proxy_alone_total{{reason=\"{why}\"}}");
        assert_eq!(rig.metric(&sample).await, 1.0, "{why}");
        let sample = format!("pd_proxy_leg_errors_total{{leg=\"prefill\",kind=\"{why}\"}}");
        assert_eq!(rig.metric(&sample).await, 1.0, "{why}");
        if matches!(why, "prefill_timeout") {
            rig.journal.until("p prefill aborted").await;
        }
    };
    check(Reply::Die, "prefill_died").await;
    check(Reply::Json(500, json!({})), "prefill_error").await;
    check(Reply::Json(503, json!({})), "prefill_busy").await;
    check(Reply::Json(429, json!({})), "prefill_busy").await;
    check(Reply::Silence, "prefill_timeout").await;
    let not_pushed = json!({"kv_transfer_params": {"pushed": false, "reason": "lora"}});
    check(Reply::Json(200, not_pushed), "not_pushed").await;
}

#[tokio::test]
async fn a_prefill_engine_that_is_gone_is_found_out_by_the_first_request() {
    let rig = Rig::start(&["--call-back-every", "1h"]).await;
    let Pair {
        p,
        d,
        p_sidecar: _p,
        ..
    } = rig.pair().await;
    // Wait for more than a second: the proxy calls an instance back at the earliest one second after the
    // previous call-back.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    drop(p);
    let answer = rig.client.post(COMPLETIONS, &prompt()).await;
    assert_eq!(answer.status, 200);
    assert_eq!(rig.record().await["alone"], "prefill_died");
    rig.until_state("p", "not_ready").await;
    let answer = rig.client.post(COMPLETIONS, &prompt()).await;
    assert_eq!(answer.status, 200);
    let all = rig.client.get("/requests").await.json();
    assert_eq!(all[1]["alone"], "no_prefill", "{all}");
    drop(d);
}

#[tokio::test]
async fn a_wrong_request_gets_the_prefill_engines_answer() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.p
        .on_prefill(Reply::Json(400, error_of("max_tokens is too large")));
    let answer = rig.client.post(COMPLETIONS, &prompt()).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json(), error_of("max_tokens is too large"));
    assert!(answer.headers.contains_key("x-request-id"));
    assert_eq!(rig.journal.lines(), ["p prefill", "p prefill served"]);
    let record = rig.record().await;
    assert_eq!(
        (&record["outcome"], &record["status"]),
        (&json!("refused"), &json!(400))
    );
}

#[tokio::test]
async fn after_the_begin_a_prefill_failure_is_only_noted() {
    for (reply, noted) in [
        (
            Reply::Held(400, error_of("late")),
            "answered 400 Bad Request",
        ),
        (Reply::Held(500, json!({})), "500 Internal Server Error"),
    ] {
        let rig = Rig::start(&[]).await;
        let pair = rig.pair().await;
        pair.p.on_prefill(reply);
        pair.d
            .on_decode(Reply::Held(200, completion("hello", 5, 3)));
        let client = rig.client.clone();
        let asked = tokio::spawn(async move { client.post(COMPLETIONS, &prompt()).await });
        rig.journal.until("p prefill").await;
        pair.p_sidecar.progress(&pair.p.only().id()).await;
        rig.journal.until("d decode").await;
        pair.p.release();
        rig.journal.until("p prefill served").await;
        // Give the proxy time to react to the prefill leg's failure before the decode engine answers: the
        // proxy must not send a second decode leg.
        rig.until("/health", |_| true).await;
        pair.d.release();
        assert_eq!(asked.await.unwrap().status, 200);
        assert_eq!(pair.d.seen().len(), 1);
        let record = rig.record().await;
        assert_eq!(record["outcome"], "done", "{record}");
        let error = record["prefill_error"].as_str().unwrap_or_default();
        assert!(error.starts_with(noted), "{record}");
    }
}

#[tokio::test]
async fn another_decode_instance_takes_over_before_the_first_byte() {
    for reply in [
        Reply::Die,
        Reply::Json(503, json!({})),
        Reply::Json(307, json!({})),
        Reply::Stream(vec![], Then::Break),
    ] {
        let rig = Rig::start(&[]).await;
        let _p = rig.instance("p", Role::Prefill).await;
        let (d1, _d1_sidecar) = rig.instance("d1", Role::Decode).await;
        let (d2, _d2_sidecar) = rig.instance("d2", Role::Decode).await;
        d1.on_decode(reply);
        // The first attempt uses a kept connection; the second attempt uses a fresh connection.
        d1.release();
        d1.release();
        let answer = rig.client.post(COMPLETIONS, &prompt()).await;
        assert_eq!(answer.json()["choices"][0]["text"], "hello");
        assert_eq!(
            d2.only().text,
            prompt().to_string(),
            "the KV went to the other one"
        );
        let record = rig.record().await;
        assert_eq!(record["alone"], "decode_retry", "{record}");
        assert_eq!(
            (&record["decode"], &record["decode_attempts"]),
            (&json!("d2"), &json!(2))
        );
        assert_eq!(rig.metric("pd_proxy_decode_retries_total").await, 1.0);
    }
}

#[tokio::test]
async fn with_no_other_decode_instance_the_client_gets_an_error() {
    let check = async |reply: Reply, status: u16, code: &str| {
        let rig = Rig::start(&["--answer-timeout", "300ms"]).await;
        let pair = rig.pair().await;
        pair.d.on_decode(reply);
        let answer = rig.client.post(COMPLETIONS, &prompt()).await;
        assert_eq!(answer.status, status, "{code}");
        assert_eq!(answer.error_code(), code);
        assert_eq!(answer.headers["retry-after"], "1", "{code}");
        assert!(answer.headers.contains_key("x-request-id"));
        assert_eq!(rig.record().await["outcome"], "failed");
    };
    check(Reply::Die, 502, "decode_died").await;
    // The proxy must not follow a redirect or pass it on: the redirect's target was not configured, and would
    // get the prompt.
    check(Reply::Json(307, json!({})), 502, "decode_died").await;
    check(Reply::Silence, 504, "decode_timeout").await;
    let busy = json!({"error": {"code": "engine_busy"}});
    check(Reply::Json(503, busy), 503, "engine_busy").await;
}

#[tokio::test]
async fn an_engine_error_is_passed_on_as_it_is() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    for status in [400, 404, 500] {
        pair.d.on_decode(Reply::Json(status, error_of("no")));
        let answer = rig.client.post(COMPLETIONS, &prompt()).await;
        assert_eq!(
            (answer.status.as_u16(), answer.json()),
            (status, error_of("no"))
        );
    }
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event() {
    let check = async |then: Then, idle_timeout: &str, code: &str| {
        let rig = Rig::start(&["--idle-timeout", idle_timeout]).await;
        let pair = rig.pair().await;
        let chunks = events(&["a"])[..1].to_vec();
        pair.d.on_decode(Reply::Stream(chunks.clone(), then));
        let mut stream = rig.client.stream(COMPLETIONS, &streamed()).await;
        assert_eq!(stream.status, 200);
        assert_eq!(stream.chunk().await, Some(Ok(chunks[0].clone())));
        pair.d.release();
        let answer = stream.whole().await;
        assert!(answer.complete, "the stream itself ends well");
        let text = answer.text();
        let event = text.trim().strip_prefix("data: ").unwrap();
        let event: Value = serde_json::from_str(event).unwrap();
        assert_eq!(event["error"]["code"], code, "{event}");
        assert!(
            !text.contains("[DONE]"),
            "an incomplete answer must not look complete"
        );
        let record = rig.record().await;
        assert_eq!(record["outcome"], "broken", "{record}");
    };
    check(Then::Break, "1h", "decode_died").await;
    check(Then::Hang, "300ms", "decode_silent").await;
}

#[tokio::test]
async fn a_break_after_the_last_event_is_no_error() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.d.on_decode(Reply::Stream(events(&["a"]), Then::Break));
    let mut stream = rig.client.stream(COMPLETIONS, &streamed()).await;
    let mut text = String::new();
    while !text.contains("[DONE]") {
        text += &stream.chunk().await.unwrap().unwrap();
    }
    pair.d.release();
    text += &stream.whole().await.text();
    assert_eq!(text, events(&["a"]).concat());
    assert_eq!(rig.record().await["outcome"], "done");
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_legs_along() {
    // The client leaves while the prefill leg is queued.
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Silence);
    let leave = leaving(&rig, prompt());
    rig.journal.until("p prefill").await;
    leave.abort();
    rig.journal.until("p prefill aborted").await;
    assert_eq!(rig.record().await["outcome"], "client_left");
    assert_eq!(rig.journal.lines(), ["p prefill", "p prefill aborted"]);

    // The client leaves while both legs compute.
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Silence);
    pair.d.on_decode(Reply::Silence);
    let leave = leaving(&rig, prompt());
    rig.journal.until("p prefill").await;
    pair.p_sidecar.progress(&pair.p.only().id()).await;
    rig.journal.until("d decode").await;
    leave.abort();
    rig.journal.until("p prefill aborted").await;
    rig.journal.until("d decode aborted").await;
    assert_eq!(rig.record().await["outcome"], "client_left");

    // The client leaves in the middle of the stream.
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.d
        .on_decode(Reply::Stream(events(&["a"])[..1].to_vec(), Then::Hang));
    let mut stream = rig.client.stream(COMPLETIONS, &streamed()).await;
    assert!(stream.chunk().await.unwrap().is_ok());
    drop(stream);
    rig.journal.until("d decode aborted").await;
    let record = rig.record().await;
    assert_eq!(record["outcome"], "client_left", "{record}");
    assert!(record["ttft_ms"].is_number(), "{record}");
    assert_eq!(rig.metric("pd_proxy_in_flight_requests").await, 0.0);
}

#[tokio::test]
async fn a_client_that_leaves_after_the_last_event_has_got_everything() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.d.on_decode(Reply::Stream(events(&["a"]), Then::Hang));
    let mut stream = rig.client.stream(COMPLETIONS, &streamed()).await;
    let mut text = String::new();
    while !text.contains("[DONE]") {
        text += &stream.chunk().await.unwrap().unwrap();
    }
    drop(stream);
    assert_eq!(rig.record().await["outcome"], "done");
}

/// Sends a request in a task. Aborting the task makes the client leave.
fn leaving(rig: &Rig, body: Value) -> tokio::task::JoinHandle<()> {
    let client = rig.client.clone();
    tokio::spawn(async move {
        client.post(COMPLETIONS, &body).await;
    })
}
