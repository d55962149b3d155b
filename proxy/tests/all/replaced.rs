//! Tests of decode engines that are dead or hang although their HTTP server works, and of slow engines. The
//! proxy replaces a dead engine before the client has got anything, and waits for a slow engine.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::Rig;
use crate::support::engine::{Engine, Reply, Then, completion, events};
use crate::support::sidecar::{Role, Sidecar};

const COMPLETIONS: &str = "/v1/completions";
const COMMENT: &str = ": keep-alive\n\n";

fn prompt() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8})
}

fn streamed() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8, "stream": true})
}

fn dead() -> Value {
    json!({"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError",
        "param": null, "code": 500}})
}

/// Two decode instances. After the first call-back, the proxy calls an instance back again only if a
/// request has failed at this instance.
struct Two {
    rig: Rig,
    d1: Engine,
    d2: Engine,
    _sidecars: [Sidecar; 2],
}

impl Two {
    async fn start(flags: &[&str]) -> Self {
        let rig = Rig::start(&[&["--call-back-every", "1h"], flags].concat()).await;
        let (d1, one) = rig.instance("d1", Role::Decode).await;
        let (d2, two) = rig.instance("d2", Role::Decode).await;
        d2.on_decode(Reply::Stream(events(&["hello"]), Then::End));
        Self {
            rig,
            d1,
            d2,
            _sidecars: [one, two],
        }
    }

    async fn metric_of(&self, name: &str, id: &str) -> f64 {
        let sample = format!("pd_proxy_instance_{name}{{instance=\"{id}\"}}");
        self.rig.metric(&sample).await
    }

    /// Sends one request, which the proxy gives to `d1` first. Checks that `d1` fails with this kind of
    /// failure and that `d2` answers.
    async fn is_taken_over(&self, body: &Value, kind: &str) {
        let answer = self.rig.client.post(COMPLETIONS, body).await;
        let whole = events(&["hello"]).concat();
        assert_eq!(
            (answer.status.as_u16(), answer.text()),
            (200, whole),
            "{kind}"
        );
        assert_eq!(
            (self.d1.seen().len(), self.d2.seen().len()),
            (1, 1),
            "{kind}"
        );
        let record = self.rig.record().await;
        assert_eq!(record["outcome"], "done", "{record}");
        assert_eq!(record["decode"], "d2", "{record}");
        assert_eq!(record["decode_attempts"], 2, "{record}");
        let sample = format!("pd_proxy_leg_errors_total{{leg=\"decode\",kind=\"{kind}\"}}");
        assert_eq!(self.rig.metric(&sample).await, 1.0, "{kind}");
    }
}

#[tokio::test]
async fn a_dead_engine_behind_its_server_is_replaced() {
    for status in [408, 500, 502, 504] {
        let two = Two::start(&[]).await;
        two.d1.on_decode(Reply::Json(status, dead()));
        two.is_taken_over(&prompt(), "error").await;
    }
    // vLLM sends the head of a stream before it knows that its engine is dead.
    let two = Two::start(&[]).await;
    let said = format!("data: {}\n\n", dead());
    let stream = vec![COMMENT.into(), said, "data: [DONE]\n\n".into()];
    two.d1.on_decode(Reply::Stream(stream, Then::End));
    two.is_taken_over(&streamed(), "error").await;
}

#[tokio::test]
async fn the_engine_that_failed_is_not_tried_again_when_its_turn_comes() {
    let two = Two::start(&[]).await;
    two.d1.on_decode(Reply::Held(500, dead()));
    let client = two.rig.client.clone();
    let first = tokio::spawn(async move { client.post(COMPLETIONS, &prompt()).await });
    two.rig.journal.until("d1 alone").await;
    // The second request goes to `d2`. When the first request then fails at `d1`, it is the turn of `d1`
    // again, but the proxy must choose `d2`.
    assert_eq!(
        two.rig.client.post(COMPLETIONS, &prompt()).await.status,
        200
    );
    two.d1.release();
    assert_eq!(first.await.unwrap().status, 200);
    assert_eq!((two.d1.seen().len(), two.d2.seen().len()), (1, 2));
}

#[tokio::test]
async fn its_health_is_asked_for_as_soon_as_it_fails() {
    let two = Two::start(&[]).await;
    two.d1.on_decode(Reply::Json(500, dead()));
    two.d1.set_health(503);
    // The last call-back was a moment ago, and the next call-back is due in an hour.
    assert_eq!(
        two.rig.client.post(COMPLETIONS, &prompt()).await.status,
        200
    );
    two.rig.until_state("d1", "not_ready").await;
}

#[tokio::test]
async fn an_error_that_nobody_has_a_better_answer_to_is_passed_on() {
    let two = Two::start(&[]).await;
    let said = format!("data: {}\n\n", dead());
    for d in [&two.d1, &two.d2] {
        let stream = vec![said.clone(), "data: [DONE]\n\n".into()];
        d.on_decode(Reply::Stream(stream, Then::End));
    }
    let answer = two.rig.client.post(COMPLETIONS, &streamed()).await;
    assert_eq!((answer.status.as_u16(), answer.json()), (500, dead()));
    let record = two.rig.record().await;
    assert_eq!(
        (&record["outcome"], &record["status"]),
        (&json!("failed"), &json!(500))
    );
}

#[tokio::test]
async fn a_request_that_breaks_every_engine_takes_none_from_others() {
    let two = Two::start(&[]).await;
    let (p, _sidecar) = two.rig.instance("p", Role::Prefill).await;
    for engine in [&two.d1, &two.d2, &p] {
        engine.on_decode(Reply::Json(500, dead()));
        engine.on_prefill(Reply::Json(500, dead()));
    }
    for _ in 0..8 {
        let answer = two.rig.client.post(COMPLETIONS, &prompt()).await;
        assert_eq!((answer.status.as_u16(), answer.json()), (500, dead()));
    }
    for id in ["d1", "d2", "p"] {
        assert_eq!(two.metric_of("paused", id).await, 0.0, "{id}");
    }
}

#[tokio::test]
async fn an_engine_that_fails_what_another_can_do_is_left_alone() {
    let two = Two::start(&["--breaker-failures", "2", "--breaker-pause", "1h"]).await;
    two.d1.on_decode(Reply::Json(500, dead()));
    for _ in 0..6 {
        assert_eq!(
            two.rig.client.post(COMPLETIONS, &prompt()).await.status,
            200
        );
    }
    assert_eq!(two.metric_of("paused", "d1").await, 1.0);
    assert_eq!(two.metric_of("failed_total", "d1").await, 2.0);
    assert_eq!(two.d1.seen().len(), 2);
}

#[tokio::test]
async fn a_hung_engine_is_replaced_and_avoided() {
    for body in [streamed(), prompt()] {
        let mut body = body;
        body["max_tokens"] = json!(1);
        let two = Two::start(&["--stall-timeout", "300ms"]).await;
        two.d1.on_decode(Reply::Silence);
        two.is_taken_over(&body, "silent").await;
        two.rig.journal.until("d1 alone aborted").await;
        for _ in 0..4 {
            assert_eq!(two.rig.client.post(COMPLETIONS, &body).await.status, 200);
        }
        assert_eq!(two.d1.seen().len(), 1, "others do not wait for it");
    }
}

#[tokio::test]
async fn a_request_that_a_dead_engine_swallowed_is_given_to_another() {
    // A request that arrives while vLLM's engine dies gets neither an answer nor an error.
    let flags = ["--call-back-every", "100ms", "--stall-timeout", "1h"];
    let rig = Rig::start(&flags).await;
    let (d1, _one) = rig.instance("d1", Role::Decode).await;
    let (d2, _two) = rig.instance("d2", Role::Decode).await;
    d1.on_decode(Reply::Silence);
    d2.on_decode(Reply::Stream(events(&["hello"]), Then::End));
    let client = rig.client.clone();
    let waits = tokio::spawn(async move { client.post(COMPLETIONS, &streamed()).await });
    rig.journal.until("d1 alone").await;
    d1.set_health(503);
    let answer = tokio::time::timeout(crate::support::PATIENCE, waits)
        .await
        .expect("the request does not wait for the stall timeout")
        .unwrap();
    assert_eq!(answer.text(), events(&["hello"]).concat());
    assert_eq!(rig.record().await["decode_attempts"], 2);
    rig.journal.until("d1 alone aborted").await;
}

#[tokio::test]
async fn a_hung_prefill_engine_is_avoided_at_once() {
    let rig = Rig::start(&["--prefill-timeout", "300ms"]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Silence);
    for _ in 0..3 {
        assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
    }
    assert_eq!(pair.p.seen().len(), 1, "others do not wait for it");
}

#[tokio::test]
async fn a_queue_that_moves_is_waited_for() {
    let two = Two::start(&["--stall-timeout", "3s"]).await;
    two.d1
        .on_decode(Reply::Stream(vec![], Then::Repeat("data: {}\n\n")));
    let mut busy = two.rig.client.stream(COMPLETIONS, &streamed()).await;
    assert_eq!(
        two.rig.client.post(COMPLETIONS, &prompt()).await.status,
        200
    );
    two.d1.on_decode(Reply::Held(200, completion("late", 5, 3)));
    let client = two.rig.client.clone();
    let waits = tokio::spawn(async move { client.post(COMPLETIONS, &streamed()).await });
    two.rig.journal.until("d1 alone").await;
    let begun = std::time::Instant::now();
    // Wait for longer than the stall timeout of 3 s. The timeout is so long because a busy machine may
    // stop this test for a second or two.
    while begun.elapsed() < Duration::from_millis(4500) {
        busy.chunk().await.unwrap().unwrap();
    }
    two.d1.release();
    let answer = waits.await.unwrap();
    let records = two.rig.client.get("/requests").await.text();
    assert!(answer.text().contains("late"), "{records}");
    assert_eq!(two.metric_of("failed_total", "d1").await, 0.0);
}

#[tokio::test]
async fn comments_are_no_answer() {
    // An engine that dies after a comment has not answered.
    let two = Two::start(&[]).await;
    two.d1
        .on_decode(Reply::Stream(vec![COMMENT.into()], Then::Break));
    let dies = async {
        two.rig.journal.until("d1 alone").await;
        two.d1.release();
    };
    let body = streamed();
    tokio::join!(two.is_taken_over(&body, "died"), dies);
    // An engine that sends only comments has not answered.
    let two = Two::start(&["--stall-timeout", "300ms"]).await;
    two.d1
        .on_decode(Reply::Stream(vec![], Then::Repeat(COMMENT)));
    two.is_taken_over(&streamed(), "silent").await;
    let ttft = two.rig.record().await["ttft_ms"].as_f64().unwrap();
    assert!(
        ttft >= 300.0,
        "the first token comes after the comments: {ttft}"
    );
}

#[tokio::test]
async fn comments_are_no_activity() {
    let rig = Rig::start(&["--idle-timeout", "300ms"]).await;
    let (d, _sidecar) = rig.instance("d", Role::Decode).await;
    let begun = events(&["a"])[..1].to_vec();
    d.on_decode(Reply::Stream(begun, Then::Repeat(COMMENT)));
    let mut stream = rig.client.stream(COMPLETIONS, &streamed()).await;
    let read = async {
        let mut text = String::new();
        while let Some(chunk) = stream.chunk().await {
            text += &chunk.unwrap();
        }
        text
    };
    let text = tokio::time::timeout(crate::support::PATIENCE, read)
        .await
        .expect("the stream ends");
    assert!(text.contains("decode_silent"), "{text}");
    assert_eq!(rig.record().await["outcome"], "broken");
}

#[tokio::test]
async fn an_answer_that_comes_as_a_whole_may_take_longer_than_a_first_event() {
    let rig = Rig::start(&["--first-byte-timeout", "300ms"]).await;
    let (d, _sidecar) = rig.instance("d", Role::Decode).await;
    d.on_decode(Reply::Held(200, completion("late", 5, 3)));
    let client = rig.client.clone();
    let waits = tokio::spawn(async move { client.post(COMPLETIONS, &prompt()).await });
    rig.journal.until("d alone").await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    d.release();
    let answer = waits.await.unwrap();
    assert_eq!(answer.status, 200, "{}", answer.text());
}

#[tokio::test]
async fn a_silent_stream_of_a_dead_engine_is_given_up_on_before_the_idle_timeout() {
    // The stall timeout of 20 s would give another reason.
    let rig = Rig::start(&["--call-back-every", "100ms"]).await;
    let (d, _sidecar) = rig.instance("d", Role::Decode).await;
    let begun = events(&["a"])[..1].to_vec();
    d.on_decode(Reply::Stream(begun, Then::Hang));
    let stream = rig.client.stream(COMPLETIONS, &streamed()).await;
    d.set_health(503);
    let text = stream.whole().await.text();
    assert!(text.contains("its /health fails"), "{text}");
    assert_eq!(rig.record().await["outcome"], "broken");
}

#[tokio::test]
async fn records_tell_how_it_ended() {
    let rig = Rig::start(&[]).await;
    let (d, _sidecar) = rig.instance("d", Role::Decode).await;
    d.on_decode(Reply::Json(
        400,
        json!({"error": {"message": "no", "code": 400}}),
    ));
    rig.client.post(COMPLETIONS, &prompt()).await;
    let mut chunks = events(&["a"]);
    chunks.insert(1, format!("data: {}\n\n", dead()));
    d.on_decode(Reply::Stream(chunks.clone(), Then::End));
    let answer = rig.client.post(COMPLETIONS, &streamed()).await;
    assert_eq!(answer.text(), chunks.concat(), "passed on as it is");
    let all = rig
        .until("/requests", |all| all.as_array().unwrap().len() == 2)
        .await;
    assert_eq!(
        (&all[0]["outcome"], &all[1]["outcome"]),
        (&json!("refused"), &json!("broken"))
    );
}
