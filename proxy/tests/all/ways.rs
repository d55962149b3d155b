//! Tests of the less usual hand-over modes: the decode leg at other times, the first token from the prefill
//! engine, sidecars and LMCache in one pair.

use serde_json::{Value, json};

use crate::support::engine::{Engine, Reply, Seen, Then, completion, events};
use crate::support::sidecar::Role;
use crate::support::{Pair, Rig};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn streamed() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8, "stream": true})
}

#[tokio::test]
async fn the_decode_leg_goes_along_with_the_prefill_leg() {
    let rig = Rig::start(&["--decode-leg", "arrival"]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Silence);
    let body = json!({"model": "m", "prompt": "hello"});
    assert_eq!(rig.client.post(COMPLETIONS, &body).await.status, 200);
    assert_eq!(pair.d.only().id(), pair.p.only().id());
    assert_eq!(
        pair.d.only().json()["kv_transfer_params"]["do_remote_prefill"],
        true
    );
}

#[tokio::test]
async fn a_decode_leg_that_went_along_is_sent_again_if_nobody_prefills() {
    let rig = Rig::start(&["--decode-leg", "arrival"]).await;
    let pair = rig.pair().await;
    pair.d.on_decode(Reply::Silence);
    pair.p
        .on_prefill(Reply::Held(500, json!({"error": "scripted"})));
    let client = rig.client.clone();
    let body = json!({"model": "m", "prompt": "hello"});
    let asked = tokio::spawn(async move { client.post(COMPLETIONS, &body).await });
    rig.journal.until("d decode").await;
    rig.journal.until("p prefill").await;
    pair.d
        .on_decode(Reply::Json(200, completion("hello", 5, 3)));
    pair.p.release();
    assert_eq!(asked.await.unwrap().status, 200);
    rig.journal.until("d decode aborted").await;
    let record = rig.record().await;
    assert_eq!(
        (&record["alone"], &record["decode_attempts"]),
        (&json!("prefill_error"), &json!(2))
    );
}

#[tokio::test]
async fn the_decode_leg_waits_for_the_prefill_answer() {
    let rig = Rig::start(&["--decode-leg", "answer"]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Held(200, completion("x", 5, 1)));
    let client = rig.client.clone();
    let body = json!({"model": "m", "prompt": "hello"});
    let asked = tokio::spawn(async move { client.post(COMPLETIONS, &body).await });
    rig.journal.until("p prefill").await;
    pair.p_sidecar.progress(&pair.p.only().id()).await;
    let heard = "pd_proxy_registration_messages_total{kind=\"progress\"}";
    rig.until_metric(heard, 1.0).await;
    assert!(pair.p.only().json()["kv_transfer_params"]["disagg_spec"]["overlap"].is_null());
    assert_eq!(rig.journal.lines(), ["p prefill"]);
    pair.p.release();
    assert_eq!(asked.await.unwrap().status, 200);
}

/// Starts a pair with sidecars, whose prefill engine gives this first token.
async fn first_token_rig(choice: Value) -> (Rig, Pair) {
    let rig = Rig::start(&["--first-token", "prefill"]).await;
    let pair = rig.pair().await;
    let mut answer = completion("", 3, 1);
    answer["choices"] = json!([choice]);
    answer["prompt_token_ids"] = json!([5, 6, 7]);
    answer["kv_transfer_params"] = json!({"pushed": true, "req_id": "r", "first_tok": 9});
    pair.p.on_prefill(Reply::Json(200, answer));
    (rig, pair)
}

#[tokio::test]
async fn the_first_token_of_a_stream_comes_from_the_prefill_engine() {
    let (rig, pair) = first_token_rig(json!({"text": "He", "finish_reason": "length"})).await;
    pair.d.on_decode(Reply::Silence);
    let mut stream = rig.client.stream(COMPLETIONS, &streamed()).await;
    let first = stream.chunk().await.unwrap().unwrap();
    assert!(first.contains(r#""text":"He""#), "{first}");
    rig.journal.until("d decode").await;
    let (prefill, decode) = (pair.p.only().json(), pair.d.only().json());
    assert_eq!(
        (
            &prefill["return_token_ids"],
            &prefill["kv_transfer_params"]["ret_first_tok"]
        ),
        (&json!(true), &json!(true))
    );
    assert_eq!(
        (&decode["prompt"], &decode["max_tokens"]),
        (&json!([5, 6, 7, 9]), &json!(7))
    );
    let spec = &decode["kv_transfer_params"]["disagg_spec"];
    assert_eq!(
        spec,
        &json!({"req_id": prefill["kv_transfer_params"]["disagg_spec"]["req_id"], "tokens": 3})
    );
}

#[tokio::test]
async fn another_decode_instance_goes_on_after_the_first_token() {
    let (rig, pair) = first_token_rig(
        json!({"message": {"role": "assistant", "content": "He"}, "finish_reason": "length"}),
    )
    .await;
    let (other, _sidecar) = rig.instance("d2", Role::Decode).await;
    for decode in [&pair.d, &other] {
        decode.on_decode(Reply::Die);
    }
    let body =
        json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": true});
    let mut stream = rig.client.stream(CHAT, &body).await;
    let head = stream.chunk().await.unwrap().unwrap();
    assert!(head.contains(r#""content":"He""#), "{head}");
    let error = stream.chunk().await.unwrap().unwrap();
    assert!(
        error.starts_with("data: {\"error\"") && error.ends_with("\n\n"),
        "{error}"
    );
    // Both engines got a leg that continues after the first token; only the first engine's leg had a
    // transfer. An engine may have got its leg twice: over a kept connection, and again over a fresh
    // connection.
    let loads = |seen: &[Seen]| {
        assert!((1..=2).contains(&seen.len()), "{seen:?}");
        for one in seen {
            assert_eq!(one.path, COMPLETIONS);
            assert_eq!(one.json()["prompt"], json!([5, 6, 7, 9]));
        }
        seen[0].json()["kv_transfer_params"].is_object()
    };
    assert_ne!(loads(&pair.d.seen()), loads(&other.seen()));

    for decode in [&pair.d, &other] {
        decode.on_decode(Reply::Stream(
            events(&["llo"]),
            crate::support::engine::Then::End,
        ));
    }
    let all = rig.client.stream(CHAT, &body).await.whole().await.text();
    let said: String = all
        .split("\n\n")
        .filter_map(|event| {
            serde_json::from_str::<Value>(event.strip_prefix("data: ")?).ok()?["choices"][0]
                ["delta"]["content"]
                .as_str()
                .map(str::to_owned)
        })
        .collect();
    assert_eq!(said, "Hello");
    assert!(all.ends_with("data: [DONE]\n\n"));
}

/// The beginning of an event that never ends.
const MORE: &str = match std::str::from_utf8(&[b'x'; 256 * 1024]) {
    Ok(text) => text,
    Err(_) => unreachable!(),
};

#[tokio::test]
async fn an_event_that_does_not_end_ends_the_stream() {
    let (rig, pair) = first_token_rig(json!({"text": "He", "finish_reason": "length"})).await;
    let begun = vec!["data: {}\n\ndata: ".into()];
    pair.d.on_decode(Reply::Stream(begun, Then::Repeat(MORE)));
    let mut stream = rig.client.stream(COMPLETIONS, &streamed()).await;
    let mut last = String::new();
    let read = async {
        while let Some(chunk) = stream.chunk().await {
            last = chunk.unwrap();
        }
    };
    let ended = tokio::time::timeout(crate::support::PATIENCE, read)
        .await
        .is_ok();
    assert!(ended, "the stream goes on for ever");
    assert!(last.contains("of one event without its end"), "{last:.300}");
    rig.journal.until("d decode aborted").await;
    assert_eq!(rig.record().await["outcome"], "broken");
}

#[tokio::test]
async fn what_the_first_token_would_change_goes_the_usual_way() {
    let half = json!({"text": "\u{fffd}", "finish_reason": "length"});
    let (rig, pair) = first_token_rig(half).await;
    pair.d.on_decode(Reply::Stream(
        events(&["hello"]),
        crate::support::engine::Then::End,
    ));
    let got = rig.client.stream(COMPLETIONS, &streamed()).await;
    assert_eq!(got.whole().await.text(), events(&["hello"]).concat());
    let decode = pair.d.only().json();
    assert_eq!(decode["prompt"], "hello");
    assert!(decode["kv_transfer_params"]["disagg_spec"]["tokens"].is_null());

    for (name, value) in [("stop", json!("x")), ("stream", json!(false))] {
        let mut body = streamed();
        body[name] = value;
        rig.client.post(COMPLETIONS, &body).await;
        let last = pair.p.seen().pop().unwrap().json();
        assert!(last["return_token_ids"].is_null(), "{last}");
        assert_eq!(
            pair.d.seen().pop().unwrap().json()["prompt"],
            "hello",
            "{name}"
        );
    }
}

#[tokio::test]
async fn lmcache_prefills_for_a_sidecar() {
    let p = Engine::alone("p").await;
    let port = p.url.rsplit(':').next().unwrap().to_owned();
    let rig = Rig::start(&["--prefiller-host", "127.0.0.1", "--prefiller-port", &port]).await;
    let (d, d_sidecar) = rig.instance("d", Role::Decode).await;
    rig.until_state(&format!("127.0.0.1:{port}"), "ready").await;
    let client = rig.client.clone();
    let body = json!({"model": "m", "messages": [], "tools": [{}]});
    let asked = tokio::spawn({
        let body = body.clone();
        async move { client.post(CHAT, &body).await }
    });
    p.journal().until("p alone served").await;
    let sent = p.only();
    assert_eq!(
        (&sent.path, &sent.json()["tools"]),
        (&CHAT.to_owned(), &body["tools"])
    );
    let params = &sent.json()["kv_transfer_params"];
    assert_eq!(
        params["disagg_spec"]["receiver_alloc_port"],
        json!(d_sidecar.register.alloc_ports)
    );
    assert!(params["do_remote_decode"].is_null());
    assert_eq!(d.seen().len(), 0, "its KV is not there before its word");
    for _ in &d_sidecar.register.init_ports {
        d_sidecar.moved(&sent.id(), 0, None).await;
    }
    assert_eq!(asked.await.unwrap().status, 200);
    let mut decode = d.only().json();
    assert_eq!(decode["kv_transfer_params"]["disagg_spec"]["written"], true);
    decode.as_object_mut().unwrap().remove("kv_transfer_params");
    assert_eq!(decode, body);
}

#[tokio::test]
async fn a_sidecar_prefills_for_lmcache() {
    let d = Engine::alone("d").await;
    let port = d.url.rsplit(':').next().unwrap().to_owned();
    let rig = Rig::start(&["--decoder-host", "127.0.0.1", "--decoder-port", &port]).await;
    let (p, p_sidecar) = rig.instance("p", Role::Prefill).await;
    rig.until_state(&format!("127.0.0.1:{port}"), "ready").await;
    let mut answer = completion("He", 3, 1);
    answer["choices"][0]["finish_reason"] = json!("length");
    answer["kv_transfer_params"] = json!({"pushed": true, "req_id": "r", "first_tok": 9});
    p.on_prefill(Reply::Json(200, answer));
    d.on_decode(Reply::Json(200, completion("llo", 4, 3)));
    let client = rig.client.clone();
    let asked = tokio::spawn(async move {
        let body = json!({"model": "m", "prompt": [1, 2], "max_tokens": 8});
        client.post(COMPLETIONS, &body).await
    });
    rig.journal.until("p prefill served").await;
    let id = p.only().id();
    // This message says that the prefill engine has begun. If both instances had sidecars, the proxy would
    // now send the decode leg.
    p_sidecar.progress(&id).await;
    let heard = "pd_proxy_registration_messages_total{kind=\"progress\"}";
    rig.until_metric(heard, 1.0).await;
    assert_eq!(d.seen().len(), 0);
    p_sidecar.moved(&id, 0, None).await;
    let answer = asked.await.unwrap().json();
    assert_eq!(answer["choices"][0]["text"], "Hello");
    assert_eq!(d.only().json()["prompt"], json!([1, 2, 9]));
}
