//! Tests of engines without a sidecar: the hand-over of each kind, and several kinds at one proxy.

use std::collections::BTreeMap;

use protocol::registration::{ProxyNotif, ToProxy};
use protocol::{RequestId, codec};
use serde_json::{Value, json};

use crate::ports::free_port;
use crate::support::Rig;
use crate::support::engine::{Engine, Reply, Then, completion, events};
use crate::zmtp::{Hello, Peer};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// Returns the flags that configure both engines as instances with this connector.
fn named(p: &Engine, d: &Engine, connector: &str) -> Vec<String> {
    let words = [
        "--prefill",
        &p.url,
        "--decode",
        &d.url,
        "--connector",
        connector,
    ];
    words.map(str::to_owned).to_vec()
}

async fn rig(flags: &[String]) -> Rig {
    let flags: Vec<_> = flags.iter().map(String::as_str).collect();
    Rig::start(&flags).await
}

fn authority(engine: &Engine) -> String {
    engine.url.strip_prefix("http://").unwrap().to_owned()
}

#[tokio::test]
async fn nixl_instances_get_what_the_prefill_answer_says() {
    let (p, d) = (Engine::alone("p").await, Engine::alone("d").await);
    let rig = rig(&named(&p, &d, "nixl")).await;
    rig.until_state(&authority(&p), "ready").await;
    rig.until_state(&authority(&d), "ready").await;
    let params = json!({"do_remote_prefill": true, "do_remote_decode": false,
        "remote_block_ids": [[1, 2]], "remote_engine_id": "e", "remote_num_tokens": 5});
    let mut answer = completion("x", 5, 1);
    answer["kv_transfer_params"] = params.clone();
    p.on_prefill(Reply::Json(200, answer));
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 8});
    let got = rig.client.post(COMPLETIONS, &body).await;
    assert_eq!(got.json()["choices"][0]["text"], "hello");
    assert_eq!(
        p.only().json()["kv_transfer_params"]["do_remote_decode"],
        true
    );
    assert_eq!(d.only().json()["kv_transfer_params"], params);
    assert_eq!(d.only().json()["max_tokens"], 8);
    assert_eq!(p.only().id(), d.only().id());

    // Without transfer parameters the decode engine cannot fetch KV, so it must compute the prompt itself.
    p.on_prefill(Reply::Json(200, completion("x", 5, 1)));
    let got = rig.client.post(COMPLETIONS, &body).await;
    assert_eq!(got.status, 200);
    assert_eq!(d.seen()[1].json(), body);
    assert_eq!(
        rig.metric("pd_proxy_alone_total{reason=\"not_pushed\"}")
            .await,
        1.0
    );
}

async fn lmcache_rig() -> (Rig, Engine, Engine) {
    let (p, d) = (Engine::alone("p").await, Engine::alone("d").await);
    let mut flags = Vec::new();
    for (side, engine) in [("prefiller", &p), ("decoder", &d)] {
        let (host, port) = authority(engine)
            .split_once(':')
            .map(|(h, p)| (h.to_owned(), p.to_owned()))
            .unwrap();
        flags.extend([
            format!("--{side}-host"),
            host,
            format!("--{side}-port"),
            port,
        ]);
    }
    flags.extend(
        [
            "--decoder-init-port",
            "8300,8301",
            "--decoder-alloc-port",
            "8400,8401",
        ]
        .map(str::to_owned),
    );
    let rig = rig(&flags).await;
    rig.until_state(&authority(&p), "ready").await;
    rig.until_state(&authority(&d), "ready").await;
    let mut answer = completion("He", 3, 1);
    answer["choices"][0]["finish_reason"] = json!("length");
    answer["kv_transfer_params"] = json!({"first_tok": 9});
    p.on_prefill(Reply::Json(200, answer));
    (rig, p, d)
}

/// Sends the notice of one rank of an LMCache prefiller: the rank has written its part.
async fn notify(rig: &Rig, id: &str) {
    let mut push = Peer::connect(rig.registration_address(), Hello::of("PUSH"))
        .await
        .unwrap();
    let notice = ToProxy::ProxyNotif(ProxyNotif {
        req_id: RequestId(id.into()),
        x: None,
        ..ProxyNotif::example()
    });
    push.send(&[&codec::encode(&notice)]).await.unwrap();
    // Keep the connection open until the port has read the message.
    rig.until_metric(
        "pd_proxy_registration_messages_total{kind=\"proxy_notif\"}",
        1.0,
    )
    .await;
}

#[tokio::test]
async fn lmcache_hands_the_first_token_over() {
    let (rig, p, d) = lmcache_rig().await;
    d.on_decode(Reply::Json(200, completion("llo", 4, 3)));
    let client = rig.client.clone();
    let body =
        json!({"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8});
    let asked = tokio::spawn(async move { client.post(CHAT, &body).await });
    let prefill = loop {
        if let Some(seen) = p.seen().into_iter().find(|seen| seen.path == COMPLETIONS) {
            break seen;
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(p.seen()[0].path, "/tokenize");
    let sent = prefill.json();
    assert_eq!(
        (&sent["prompt"], &sent["max_tokens"]),
        (&json!([5, 6, 7]), &json!(1))
    );
    let params = &sent["kv_transfer_params"];
    assert_eq!(params["ret_first_tok"], true);
    let id = params["disagg_spec"]["req_id"].as_str().unwrap().to_owned();
    assert_eq!(
        params["disagg_spec"]["receiver_alloc_port"],
        json!([8400, 8401])
    );
    notify(&rig, &id).await;
    assert_eq!(d.seen().len(), 0, "both ranks have to say so");
    notify(&rig, &id).await;

    let answer = asked.await.unwrap().json();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["message"]["content"], "Hello");
    assert_eq!(answer["usage"]["completion_tokens"], 4);
    let decode = d.only();
    assert_eq!(decode.path, COMPLETIONS);
    assert_eq!(
        (&decode.json()["prompt"], &decode.json()["max_tokens"]),
        (&json!([5, 6, 7, 9]), &json!(7))
    );
    assert!(decode.json()["kv_transfer_params"].is_null());
}

#[tokio::test]
async fn the_first_token_is_there_before_the_decode_leg_answers() {
    let (rig, p, d) = lmcache_rig().await;
    let chunks = events(&["llo"]);
    d.on_decode(Reply::Silence);
    let client = rig.client.clone();
    let body = json!({"model": "m", "prompt": [1, 2], "max_tokens": 8, "stream": true});
    let asked = tokio::spawn(async move { client.stream(COMPLETIONS, &body).await });
    p.journal().until("p prefill").await;
    let id = p.only().id();
    notify(&rig, &id).await;
    notify(&rig, &id).await;
    let mut stream = asked.await.unwrap();
    let first = stream.chunk().await.unwrap().unwrap();
    let first: Value = serde_json::from_str(first.trim().strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(first["choices"][0]["text"], "He");
    drop(stream);
    d.journal().until("d alone aborted").await;

    d.on_decode(Reply::Stream(chunks, Then::End));
    let client = rig.client.clone();
    let body = json!({"model": "m", "prompt": [1, 2], "max_tokens": 8, "stream": true});
    let asked = tokio::spawn(async move { client.stream(COMPLETIONS, &body).await });
    while p.seen().len() < 2 {
        tokio::task::yield_now().await;
    }
    let id = p.seen()[1].id();
    notify(&rig, &id).await;
    notify(&rig, &id).await;
    let whole = asked.await.unwrap().whole().await.text();
    assert!(
        whole.find("He").unwrap() < whole.find("llo").unwrap(),
        "{whole}"
    );
    assert!(whole.ends_with("data: [DONE]\n\n"), "{whole}");
}

#[tokio::test]
async fn what_lmcache_cannot_express_is_computed_by_the_decoder() {
    let (rig, p, d) = lmcache_rig().await;
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 8, "stop": ["x"]});
    assert_eq!(rig.client.post(COMPLETIONS, &body).await.status, 200);
    assert_eq!(p.seen().len(), 0);
    assert_eq!(d.only().json(), body);
    assert_eq!(rig.record().await["alone"], "not_expressible");
}

#[tokio::test]
async fn p2p_nccl_instances_register_and_meet_by_request_id() {
    let (p, d) = (Engine::alone("p").await, Engine::alone("d").await);
    let address = format!("127.0.0.1:{}", free_port());
    let rig = rig(&["--p2p-registration".to_owned(), address.clone()]).await;
    let mut dealers = Vec::new();
    for (kind, engine, zmq) in [("P", &p, "10.0.0.1:21001"), ("D", &d, "10.0.0.2:22001")] {
        let hello = Hello {
            identity: zmq,
            ..Hello::of("DEALER")
        };
        let mut dealer = Peer::connect(&address, hello).await.unwrap();
        let http = authority(engine);
        let hello = BTreeMap::from([
            ("type", kind),
            ("http_address", &http),
            ("zmq_address", zmq),
        ]);
        let hello = rmp_serde::to_vec_named(&hello).unwrap();
        dealer.send(&[&hello]).await.unwrap();
        rig.until_state(&http, "ready").await;
        dealers.push(dealer);
    }
    let body = json!({"model": "m", "prompt": "hello", "max_tokens": 8});
    let got = rig.client.post(COMPLETIONS, &body).await;
    assert_eq!(got.json()["choices"][0]["text"], "hello");
    assert_eq!(p.only().json()["max_tokens"], 1);
    assert!(p.only().json()["kv_transfer_params"].is_null());
    assert_eq!(d.only().json(), body);
    let id = d.only().id();
    assert_eq!(p.only().id(), id);
    let start = "___prefill_addr_10.0.0.1:21001___decode_addr_10.0.0.2:22001_";
    assert!(
        id.starts_with(start) && id.len() == start.len() + 32,
        "{id}"
    );
    let shown = rig.record().await;
    assert_eq!(shown["leg_id"], id.as_str());
    assert_eq!(got.headers["x-request-id"], shown["id"].as_str().unwrap());
}

#[tokio::test]
async fn kinds_can_be_mixed() {
    let (p, d) = (Engine::alone("np").await, Engine::alone("nd").await);
    let rig = rig(&named(&p, &d, "nixl")).await;
    let pair = rig.pair().await;
    rig.until_state(&authority(&p), "ready").await;
    rig.until_state(&authority(&d), "ready").await;
    let mut answer = completion("x", 5, 1);
    answer["kv_transfer_params"] = json!({"do_remote_prefill": true});
    p.on_prefill(Reply::Json(200, answer));
    for _ in 0..4 {
        let body = json!({"model": "m", "prompt": "hello", "max_tokens": 8});
        assert_eq!(rig.client.post(COMPLETIONS, &body).await.status, 200);
    }
    // Each request went to two instances of the same kind.
    for (prefill, decode) in [(&p, &d), (&pair.p, &pair.d)] {
        let ids = |engine: &Engine| -> Vec<_> {
            engine
                .seen()
                .iter()
                .map(crate::support::engine::Seen::id)
                .collect()
        };
        assert_eq!(ids(prefill).len(), 2);
        assert_eq!(ids(prefill), ids(decode));
    }
}
