//! Tests the endpoints that came after chat completions: they are split over two instances, too.

use serde_json::{Value, json};

use crate::support::Rig;
use crate::support::engine::{Reply, Then};
use crate::support::sidecar::Role;

const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";

/// Returns the answer of `/v1/responses`.
fn response(cached: u64) -> Value {
    json!({"id": "resp_1", "object": "response", "kv_transfer_params": {"pushed": true},
        "usage": {"input_tokens": 9, "output_tokens": 2, "input_tokens_details": {"cached_tokens": cached}}})
}

#[tokio::test]
async fn messages_are_split() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let counted = |read: u64| json!({"type": "message", "usage": {"input_tokens": 9 - read, "output_tokens": 2, "cache_read_input_tokens": read}});
    pair.p.on_prefill(Reply::Json(200, counted(3)));
    pair.d.on_decode(Reply::Json(200, counted(8)));
    let body = json!({"model": "m", "max_tokens": 9, "system": "s", "stop_sequences": ["x"],
        "thinking": {"type": "enabled", "budget_tokens": 4},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]});
    let answer = rig.client.post(MESSAGES, &body).await;
    // The client gets the prefill engine's number of cached tokens.
    assert_eq!(answer.json(), counted(3));
    let (prefill, decode) = (pair.p.only(), pair.d.only());
    assert_eq!((&*prefill.path, &*decode.path), (MESSAGES, MESSAGES));
    let mut leg = prefill.json();
    assert_eq!(leg["kv_transfer_params"]["do_remote_decode"], true);
    assert!(
        leg.as_object_mut()
            .unwrap()
            .remove("kv_transfer_params")
            .is_some()
    );
    let mut expect = body.clone();
    expect.as_object_mut().unwrap().remove("stop_sequences");
    (expect["max_tokens"], expect["stream"]) = (json!(1), json!(false));
    assert_eq!(leg, expect);
    let mut leg = decode.json();
    assert_eq!(leg["kv_transfer_params"]["do_remote_prefill"], true);
    leg.as_object_mut().unwrap().remove("kv_transfer_params");
    assert_eq!(leg, body);
    let record = rig.record().await;
    assert_eq!(
        (&record["endpoint"], &record["alone"]),
        (&json!("messages"), &Value::Null)
    );
    assert_eq!(
        (&record["prompt_tokens"], &record["completion_tokens"]),
        (&json!(9), &json!(2))
    );
}

#[tokio::test]
async fn a_stream_of_messages_that_breaks_ends_with_an_error_that_clients_know() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let chunks = vec!["event: message_start\ndata: {\"type\":\"message_start\"}\n\n".to_owned()];
    pair.d.on_decode(Reply::Stream(chunks, Then::Break));
    let body = json!({"model": "m", "max_tokens": 9, "stream": true, "messages": []});
    let mut stream = rig.client.stream(MESSAGES, &body).await;
    assert!(stream.chunk().await.unwrap().is_ok());
    pair.d.release();
    let text = stream.whole().await.text();
    let (event, data) = text.trim().split_once('\n').unwrap();
    assert_eq!(event, "event: error");
    let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(
        (&data["type"], &data["error"]["type"]),
        (&json!("error"), &json!("upstream_error"))
    );
}

#[tokio::test]
async fn responses_are_split_and_have_an_id_that_the_proxy_knows() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Json(200, response(3)));
    pair.d.on_decode(Reply::Json(200, response(8)));
    let body = json!({"model": "m", "input": "hi", "instructions": "s", "max_output_tokens": 9});
    let answer = rig.client.post(RESPONSES, &body).await.json();
    assert_eq!(answer["usage"]["input_tokens_details"]["cached_tokens"], 3);
    assert!(answer["kv_transfer_params"].is_null());
    let leg = pair.p.only().json();
    assert_eq!(
        (&leg["max_output_tokens"], &leg["store"]),
        (&json!(1), &json!(false))
    );
    assert_eq!(
        (&leg["input"], &leg["instructions"]),
        (&json!("hi"), &json!("s"))
    );
    assert!(leg["request_id"].is_null());
    let leg = pair.d.only().json();
    let id = leg["request_id"].as_str().unwrap();
    assert!(id.starts_with("resp_") && id.len() == 21, "{id}");

    // Without storage the body stays as it is.
    let body = json!({"model": "m", "input": "hi", "store": false});
    assert_eq!(rig.client.post(RESPONSES, &body).await.status, 200);
    assert!(pair.d.seen()[1].json()["request_id"].is_null());
}

#[tokio::test]
async fn a_stored_response_is_found_again() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let (other, _sidecar) = rig.instance("other", Role::Decode).await;
    let decodes = [&pair.d, &other];
    for decode in decodes {
        decode.on_decode(Reply::Json(200, response(8)));
    }
    for number in 0..4 {
        let id = format!("resp_{number}");
        let body = json!({"model": "m", "input": "hi", "request_id": id});
        assert_eq!(rig.client.post(RESPONSES, &body).await.status, 200);
        let holds = |decode: &&&crate::support::engine::Engine| {
            let seen = decode.seen();
            seen.iter()
                .any(|seen| seen.text.contains(&format!("\"{id}\"")))
        };
        let holder = decodes.iter().find(holds).unwrap();
        let before = [pair.d.seen().len(), other.seen().len()];
        let next =
            json!({"model": "m", "input": "more", "previous_response_id": id, "store": false});
        rig.client.post(RESPONSES, &next).await;
        rig.client
            .get(&format!("{RESPONSES}/{id}?stream=true"))
            .await;
        rig.client
            .post(&format!("{RESPONSES}/{id}/cancel"), &json!({}))
            .await;
        let after = [pair.d.seen().len(), other.seen().len()];
        assert_eq!(after[0] + after[1], before[0] + before[1] + 3);
        let seen = holder.seen();
        let last: Vec<_> = seen[seen.len() - 3..]
            .iter()
            .map(|seen| &*seen.path)
            .collect();
        let shown = format!("{RESPONSES}/{id}?stream=true");
        assert_eq!(
            last,
            [RESPONSES, &shown, &format!("{RESPONSES}/{id}/cancel")]
        );
    }
    // Only the first turns had a prefill leg.
    assert_eq!(pair.p.seen().len(), 4);
    let alone = "pd_proxy_alone_total{reason=\"stored_response\"}";
    assert!(rig.metric(alone).await >= 4.0);
}

#[tokio::test]
async fn a_response_of_another_proxy_is_asked_for() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let (other, _sidecar) = rig.instance("other", Role::Decode).await;
    pair.d
        .on_decode(Reply::Json(404, json!({"error": {"code": 404}})));
    other.on_decode(Reply::Json(200, response(8)));
    for number in 0..4 {
        let body = json!({"model": "m", "input": "hi", "previous_response_id": "resp_9"});
        let answer = rig.client.post(RESPONSES, &body).await;
        assert_eq!(answer.status, 200, "{number}");
    }
    // The proxy asks once and remembers the answer.
    assert!(pair.d.seen().len() <= 1);
    let answer = rig.client.get(&format!("{RESPONSES}/resp_9")).await;
    assert_eq!(answer.json(), response(8));
}

#[tokio::test]
async fn invocations_are_split_by_the_form_of_their_body() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let chat = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let prompt = json!({"model": "m", "prompt": "hi"});
    for body in [&chat, &prompt] {
        assert_eq!(rig.client.post("/invocations", body).await.status, 200);
    }
    let paths = |seen: Vec<crate::support::engine::Seen>| -> Vec<_> {
        seen.into_iter().map(|seen| seen.path).collect()
    };
    assert_eq!(paths(pair.p.seen()), ["/invocations"; 2]);
    assert_eq!(paths(pair.d.seen()), ["/invocations"; 2]);
    let embed = json!({"model": "m", "input": "hi"});
    assert_eq!(rig.client.post("/invocations", &embed).await.status, 200);
    assert_eq!(pair.p.seen().len(), 2);
    assert_eq!(pair.d.seen()[2].json(), embed);
}
