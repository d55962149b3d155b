//! Tests the endpoints whose requests are passed whole to one decode instance.

use http::Method;
use proxy::{Methods, PASSED_ON};
use serde_json::json;

use crate::support::Rig;
use crate::support::engine::{Reply, Then};

#[tokio::test]
async fn every_endpoint_of_the_table_reaches_a_decode_instance() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.d.on_decode(Reply::Json(418, json!({"of": "d"})));
    let mut sent = 0;
    // `realtime.rs` tests the only WebSocket.
    for passed in PASSED_ON.iter().filter(|p| p.path != "/v1/realtime") {
        let methods: &[Method] = match passed.methods {
            Methods::Get => &[Method::GET],
            Methods::Post => &[Method::POST],
            Methods::GetPost => &[Method::GET, Method::POST],
            Methods::GetDelete => &[Method::GET, Method::DELETE],
        };
        for method in methods {
            let body = match *method {
                Method::POST => r#"{"model": "m", "max_tokens": 3}"#,
                _ => "",
            };
            let path = format!("{}?a=b%20c", passed.path.replace("{id}", "resp_1"));
            let asked = rig.client.open(method.clone(), &path, &[], body.into());
            let answer = asked.await.whole().await;
            // The engine's answer decides, with any status.
            assert_eq!(answer.status, 418, "{path}");
            assert_eq!(answer.json(), json!({"of": "d"}), "{path}");
            let seen = pair.d.seen();
            let seen = &seen[sent];
            sent += 1;
            assert_eq!((&*seen.method, &*seen.path), (method.as_str(), &*path));
            assert_eq!(seen.text, body);
            assert_eq!(seen.headers.contains_key("content-type"), !body.is_empty());
            assert_eq!(answer.headers["x-request-id"], seen.headers["x-request-id"]);
        }
        let path = passed.path.replace("{id}", "resp_1");
        let answer = rig.client.post(&format!("{path}/"), &json!({})).await;
        assert_eq!(answer.status, 307, "{path}");
        assert_eq!(answer.headers["location"], path);
    }
    let wrong = rig.client.get("/tokenize").await;
    assert_eq!(wrong.status, 405);
    assert!(pair.p.seen().is_empty());
    assert_eq!(pair.d.seen().len(), sent);
}

#[tokio::test]
async fn a_body_of_any_form_arrives_byte_for_byte() {
    let rig = Rig::start(&["--max-body-bytes", "1000"]).await;
    let pair = rig.pair().await;
    let form = "--x\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nRIFF\r\n--x--\r\n";
    let kind = ("content-type", "multipart/form-data; boundary=x");
    let audio = "/v1/audio/transcriptions";
    let chunks = ["data: {\"text\":\"a\"}\n\n", "data: [DONE]\n\n"].map(str::to_owned);
    pair.d.on_decode(Reply::Stream(chunks.to_vec(), Then::End));
    let answer = rig.client.post_with(audio, &[kind], form).await;
    assert_eq!(answer.text(), chunks.concat());
    let seen = pair.d.only();
    assert_eq!((&*seen.text, seen.path.as_str()), (form, audio));
    assert_eq!(seen.headers["content-type"], kind.1);
    let record = rig.record().await;
    assert_eq!(
        (&record["endpoint"], &record["alone"]),
        (&json!(audio), &json!("passed_on"))
    );
    assert_eq!(
        (&record["outcome"], &record["stream"]),
        (&json!("done"), &json!(true))
    );

    let long = rig.client.post_with(audio, &[kind], "x".repeat(1001)).await;
    assert_eq!(
        (long.status.as_u16(), long.error_code()),
        (413, "body_too_large".into())
    );
    // A browser sends a form to another site without asking first.
    let site = ("sec-fetch-site", "cross-site");
    let page = rig.client.post_with(audio, &[kind, site], form).await;
    assert_eq!(
        (page.status.as_u16(), page.error_code()),
        (403, "not_permitted".into())
    );
    pair.d.only();
    rig.until_metric(
        "pd_proxy_requests_total{endpoint=\"passed\",outcome=\"done\"}",
        1.0,
    )
    .await;
}

#[tokio::test]
async fn only_probes_need_no_key_and_leave_no_record() {
    let rig = Rig::start(&["--api-key", "secret"]).await;
    let pair = rig.pair().await;
    for path in ["/version", "/ping", "/load"] {
        assert_eq!(rig.client.get(path).await.status, 200, "{path}");
    }
    let body = json!({"prompt": "a"});
    assert_eq!(rig.client.post("/tokenize", &body).await.status, 401);
    let key = ("authorization", "Bearer secret");
    let keys = [key];
    let answer = rig.client.post_with("/pooling", &keys, body.to_string());
    assert_eq!(answer.await.status, 200);
    assert_eq!(rig.record().await["endpoint"], "/pooling");
    assert_eq!(pair.d.seen().len(), 4);
    assert!(
        pair.d
            .seen()
            .iter()
            .all(|seen| !seen.headers.contains_key("authorization"))
    );
}

#[tokio::test]
async fn another_instance_takes_over() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.d.on_decode(Reply::Die);
    let (other, _sidecar) = rig
        .instance("other", crate::support::sidecar::Role::Decode)
        .await;
    other.on_decode(Reply::Json(200, json!({"of": "other"})));
    for _ in 0..2 {
        let answer = rig.client.post("/pooling", &json!({"input": "a"})).await;
        assert_eq!(answer.json(), json!({"of": "other"}));
    }
    assert_eq!(other.seen().len(), 2);
}

#[tokio::test]
async fn a_batch_carries_no_transfer_parameters() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let batch = "/v1/chat/completions/batch";
    let messages = json!([[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]);
    let body = json!({"messages": messages, "max_tokens": 2});
    assert_eq!(rig.client.post(batch, &body).await.status, 200);
    assert_eq!(pair.d.only().json(), body);
    let mut hostile = body.clone();
    hostile["kv_transfer_params"] = json!({"do_remote_prefill": true, "remote_host": "10.0.0.1"});
    let answer = rig.client.post(batch, &hostile).await;
    assert_eq!(answer.error_code(), "kv_transfer_params_not_allowed");
    pair.d.only();
}
