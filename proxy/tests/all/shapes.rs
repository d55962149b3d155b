//! Tests that requests and answers are the same as with a single vLLM server.

use serde_json::json;

use crate::support::Rig;
use crate::support::engine::{Reply, Then, completion};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_field_of_a_newer_engine_is_judged_by_the_decode_engine() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let refusal = json!({"error": {"message": "only with more than one token", "code": 400}});
    pair.p.on_prefill(Reply::Json(400, refusal.clone()));
    let body = json!({"model": "m", "prompt": "hello", "of_the_next_version": 1});
    assert_eq!(rig.client.post(COMPLETIONS, &body).await.status, 200);
    assert_eq!(rig.record().await["alone"], "prefill_refused");
    assert_eq!(pair.d.only().json(), body);

    // If the proxy knows all fields of a refused request, the decode engine will also refuse the request. So
    // the client gets the prefill engine's refusal.
    let body = json!({"model": "other", "prompt": "hello"});
    let answer = rig.client.post(COMPLETIONS, &body).await;
    assert_eq!((answer.status.as_u16(), answer.json()), (400, refusal));
    pair.d.only();
}

/// A single vLLM refuses some streams with a status, and others with an event in a stream of status 200. Only the decode
/// leg is a stream, so only the decode engine gives the right form.
#[tokio::test]
async fn a_refused_stream_has_the_decode_engines_form() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let refusal = json!({"error": {"message": "the prompt is empty", "code": 400}});
    pair.p.on_prefill(Reply::Json(400, refusal.clone()));
    let event = format!("data: {refusal}\n\ndata: [DONE]\n\n");
    pair.d
        .on_decode(Reply::Stream(vec![event.clone()], Then::End));
    let body = json!({"model": "m", "prompt": [[]], "stream": true});
    let answer = rig.client.post(COMPLETIONS, &body).await;
    assert_eq!((answer.status.as_u16(), answer.text()), (200, event));
    assert_eq!(pair.d.only().json(), body);
}

#[tokio::test]
async fn usage_tells_what_the_prefill_engine_had_cached() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let counted = |cached: u64| {
        let mut answer = completion("hello", 5, 3);
        answer["usage"]["prompt_tokens_details"] = json!({"cached_tokens": cached});
        answer["kv_transfer_params"] = json!({"pushed": true, "remote_host": "10.0.0.1"});
        answer
    };
    pair.p.on_prefill(Reply::Json(200, counted(2)));
    pair.d.on_decode(Reply::Json(200, counted(4)));
    let body = json!({"model": "m", "messages": []});
    let answer = rig.client.post(CHAT, &body).await.json();
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
    assert!(answer["kv_transfer_params"].is_null(), "{answer}");

    // If the prefill engine does not report the number of cached tokens, the client's answer does not contain
    // the number.
    pair.p.on_prefill(Reply::Json(200, completion("x", 5, 1)));
    let answer = rig.client.post(CHAT, &body).await.json();
    assert!(answer["usage"]["prompt_tokens_details"]["cached_tokens"].is_null());

    pair.p.on_prefill(Reply::Json(200, counted(2)));
    let chunks = [
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"prompt_tokens_details\":{\"cached_to",
        "kens\":4}}}\n\nda",
        "ta: [DONE]\n\n",
    ];
    let chunks = chunks.map(str::to_owned).to_vec();
    pair.d.on_decode(Reply::Stream(chunks, Then::End));
    let body = json!({"model": "m", "prompt": "hello", "stream": true});
    let answer = rig.client.post(COMPLETIONS, &body).await;
    let expect = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":5,\"prompt_tokens_details\":{\"cached_tokens\":2}}}\n\ndata: [DONE]\n\n";
    assert_eq!(answer.text(), expect);
}

#[tokio::test]
async fn an_answer_has_the_name_that_its_client_chose() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let check = async |header: Option<&str>, field: &str, expect: Option<&str>| {
        let sent = pair.d.seen().len();
        let body = json!({"model": "m", "prompt": "hello", "request_id": field});
        let headers: Vec<_> = header
            .map(|name| ("x-request-id", name))
            .into_iter()
            .collect();
        let answer = rig
            .client
            .post_with(COMPLETIONS, &headers, body.to_string())
            .await;
        let told = answer.headers["x-request-id"].to_str().unwrap().to_owned();
        let (prefill, decode) = (pair.p.seen()[sent].id(), pair.d.seen()[sent].id());
        // Two requests with the same name get different ids, so that their transfers are kept apart.
        assert_eq!(prefill, told);
        assert_eq!(decode, expect.map_or(told.clone(), str::to_owned));
        if let Some(name) = expect {
            assert!(
                told.starts_with(name) && told.len() == name.len() + 9,
                "{told}"
            );
        }
    };
    check(None, "mine.1", Some("mine.1")).await;
    check(None, "mine.1", Some("mine.1")).await;
    check(Some("header"), "mine", Some("header")).await;
    check(None, "___decode_addr_10.0.0.1:80", None).await;
    check(Some("a b"), "mine", None).await;
}

#[tokio::test]
async fn paths_are_read_as_engines_read_them() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let body = json!({"model": "m", "prompt": "hello"});
    for path in ["/v1/%63ompletions", "/v1%2Fcompletions?a=b"] {
        assert_eq!(rig.client.post(path, &body).await.status, 200, "{path}");
    }
    assert_eq!(pair.d.seen().len(), 2);
    let answer = rig.client.post("/v1/completions/?a=b", &body).await;
    assert_eq!(answer.status, 307);
    assert_eq!(answer.headers["location"], "/v1/completions?a=b");
    for path in [
        "//v1/completions",
        "/v1/%2563ompletions",
        "/v1/%ff",
        "/v1/a%20b",
        "/%3F",
        "//other/",
    ] {
        assert_eq!(rig.client.post(path, &body).await.status, 404, "{path}");
    }
    let answer = rig.client.get("/healthcheck").await;
    assert_eq!(
        answer.json(),
        json!({"status": "ok", "prefill_instances": 1, "decode_instances": 1})
    );
    assert_eq!(pair.d.seen().len(), 2);
}
