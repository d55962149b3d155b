//! Tests of the two legs of a request: their contents, their order, and the answer.

use serde_json::{Value, json};

use crate::support::Rig;
use crate::support::engine::{Reply, Then, completion, events};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn prompt() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8})
}

#[tokio::test]
async fn the_decode_leg_waits_for_the_prefill_engine_to_begin() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Held(200, completion("x", 5, 1)));
    let client = rig.client.clone();
    let asked = tokio::spawn(async move { client.post(COMPLETIONS, &prompt()).await });

    rig.journal.until("p prefill").await;
    let id = pair.p.only().id();
    // A message from the wrong instance, and a message about another request, change nothing.
    pair.d_sidecar.progress(&id).await;
    pair.p_sidecar.progress("another").await;
    let stray = "pd_proxy_registration_messages_total{kind=\"stray\"}";
    rig.until_metric(stray, 2.0).await;
    assert_eq!(rig.journal.lines(), ["p prefill"]);

    pair.p_sidecar.progress(&id).await;
    let answer = asked.await.unwrap();
    assert_eq!(answer.json()["choices"][0]["text"], "hello");
    assert_eq!(answer.headers["x-request-id"], id.as_str());
    assert_eq!(pair.d.only().id(), id);
    let record = rig.record().await;
    assert_eq!(record["outcome"], "done", "{record}");
    assert!(
        record["begun_ms"].is_number() && record["prefill_ms"].is_null(),
        "{record}"
    );
    // The decode leg's answer was complete before the prefill leg's answer, so the prefill leg is dropped.
    rig.journal.until("p prefill aborted").await;
}

/// The prefill engine computes the prompt once and with the salt. The decode engine generates the
/// sequences.
#[tokio::test]
async fn a_salt_goes_to_both_engines_and_the_number_of_sequences_to_one() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let mut body = prompt();
    body["cache_salt"] = "mine".into();
    body["n"] = 3.into();
    assert_eq!(rig.client.post(COMPLETIONS, &body).await.status, 200);
    let (prefill, decode) = (pair.p.only().json(), pair.d.only().json());
    assert_eq!(
        (&prefill["cache_salt"], &prefill["n"]),
        (&json!("mine"), &Value::Null)
    );
    assert_eq!(
        (&decode["cache_salt"], &decode["n"]),
        (&json!("mine"), &json!(3))
    );
    assert_eq!(rig.record().await["alone"], Value::Null);
}

/// Both engines get the whole list. Each prompt has a transfer of its own, whose id begins with the request's
/// id.
#[tokio::test]
async fn a_list_of_prompts_goes_to_both_engines() {
    let rig = Rig::start(&["--first-token", "prefill"]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Held(200, completion("x", 5, 1)));
    let mut body = prompt();
    body["prompt"] = json!(["hello", [1, 2]]);
    body["stream"] = true.into();
    let (client, sent) = (rig.client.clone(), body.clone());
    let asked = tokio::spawn(async move { client.post(COMPLETIONS, &sent).await });
    rig.journal.until("p prefill").await;
    let id = pair.p.only().id();
    pair.p_sidecar.progress(&format!("{id}/1")).await;
    assert_eq!(asked.await.unwrap().status, 200);
    for leg in [pair.p.only(), pair.d.only()] {
        assert_eq!(leg.json()["prompt"], body["prompt"]);
        let spec = &leg.json()["kv_transfer_params"]["disagg_spec"];
        assert_eq!(spec["req_id"], id.as_str());
    }
    for prompt in [id.clone(), format!("{id}/1")] {
        pair.p_sidecar.moved(&prompt, 1000, None).await;
    }
    let record = rig
        .until("/requests", |all| all[0]["moved"]["ranks"] == 2)
        .await[0]
        .clone();
    assert_eq!(record["moved"]["bytes"], 2000, "{record}");
    assert_eq!(record["alone"], Value::Null, "{record}");
}

#[tokio::test]
async fn without_a_word_the_prefill_answer_sends_the_decode_leg() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let answer = rig.client.post(COMPLETIONS, &prompt()).await;
    assert_eq!(answer.status, 200);
    let lines = rig.journal.lines();
    assert_eq!(lines[..3], ["p prefill", "p prefill served", "d decode"]);

    let id = pair.p.only().id();
    assert_eq!(
        pair.p.only().json(),
        json!({
            "model": "m", "prompt": "hello", "max_tokens": 1, "stream": false, "ignore_eos": true,
            "kv_transfer_params": {"do_remote_decode": true, "disagg_spec": {
                "req_id": id, "receiver_host": "127.0.0.1", "receiver_init_port": [7300, 7301],
                "receiver_alloc_port": [7400, 7401], "overlap": true,
            }},
        })
    );
    assert_eq!(
        pair.d.only().text,
        format!(
            r#"{{"max_tokens":8,"model":"m","prompt":"hello","kv_transfer_params":{{"do_remote_prefill":true,"disagg_spec":{{"req_id":"{id}"}}}}}}"#
        )
    );
    pair.p_sidecar.moved(&id, 1000, None).await;
    pair.p_sidecar.moved(&id, 24, None).await;
    let record = rig
        .until("/requests", |all| all[0]["moved"]["ranks"] == 2)
        .await[0]
        .clone();
    assert_eq!(record["moved"]["bytes"], 1024, "{record}");
    assert_eq!(record["moved"]["transport"], "nixl", "{record}");
    assert_eq!(
        (&record["prefill"], &record["decode"]),
        (&json!("p"), &json!("d"))
    );
    assert_eq!(record["prompt_tokens"], 5, "{record}");
    assert_eq!(record["completion_tokens"], 3, "{record}");
    assert_eq!(rig.metric("pd_proxy_transfers_total").await, 1.0);
}

#[tokio::test]
async fn a_stream_is_passed_on_chunk_by_chunk() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let chunks = events(&["a", "b"]);
    pair.d
        .on_decode(Reply::Stream(chunks[..2].to_vec(), Then::Hang));
    let mut stream = rig
        .client
        .stream(CHAT, &json!({"model": "m", "messages": [], "stream": true}))
        .await;
    assert_eq!(
        stream.headers["content-type"],
        "text/event-stream; charset=utf-8"
    );
    let mut got = String::new();
    while got.len() < chunks[..2].concat().len() {
        got += &stream.chunk().await.unwrap().unwrap();
    }
    assert_eq!(got, chunks[..2].concat());
    assert_eq!(pair.p.only().path, CHAT);
    assert_eq!(pair.p.only().json()["stream"], false);
    assert_eq!(pair.d.only().json()["stream"], true);
}
