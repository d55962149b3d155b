//! Tests of the endpoints that change a running proxy, and of the permission to use them.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};

use crate::support::Rig;
use crate::support::engine::{Engine, Reply, completion};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn chat(contents: &[&str]) -> Value {
    let messages: Vec<_> = contents
        .iter()
        .map(|text| json!({"role": "user", "content": text}))
        .collect();
    json!({"model": "m", "messages": messages, "max_tokens": 8})
}

#[tokio::test]
async fn instances_come_and_go() {
    let rig = Rig::start(&[]).await;
    let (d1, d2) = (Engine::alone("d1").await, Engine::alone("d2").await);
    for (id, engine) in [("d1", &d1), ("d2", &d2)] {
        let named = json!({"role": "decode", "url": engine.url, "id": id});
        let added = rig.client.post("/instances", &named).await;
        assert_eq!(
            (added.status.as_u16(), added.json()["id"].clone()),
            (201, json!(id))
        );
        rig.until_state(id, "ready").await;
    }
    let body = json!({"model": "m", "prompt": "hello"});
    assert_eq!(
        rig.client
            .post("/instances/d1/drain", &json!({}))
            .await
            .status,
        200
    );
    rig.until("/instances", |all| all[0]["draining"] == true)
        .await;
    for _ in 0..2 {
        assert_eq!(rig.client.post(COMPLETIONS, &body).await.status, 200);
    }
    assert_eq!((d1.seen().len(), d2.seen().len()), (0, 2));
    assert_eq!(
        rig.client
            .post("/instances/d1/resume", &json!({}))
            .await
            .status,
        200
    );
    rig.until("/instances", |all| all[0]["draining"] == false)
        .await;
    assert_eq!(rig.client.delete("/instances/d2").await.status, 200);
    rig.until_state("d2", "gone").await;
    assert_eq!(rig.client.post(COMPLETIONS, &body).await.status, 200);
    assert_eq!(d1.seen().len(), 1);
    assert_eq!(
        rig.client.delete("/instances/d2").await.error_code(),
        "no_such_instance"
    );
    let bad = rig
        .client
        .post("/instances", &json!({"role": "decode", "url": "ftp://x"}))
        .await;
    assert_eq!(bad.error_code(), "invalid_instance");
}

#[tokio::test]
async fn later_turns_go_where_the_conversation_is() {
    let rig = Rig::start(&["--mode", "ppd"]).await;
    let pair = rig.pair().await;
    let (other, _sidecar) = rig
        .instance("d2", crate::support::sidecar::Role::Decode)
        .await;
    // All later turns of the conversation must go to the first decode instance, not to the second
    // instance.
    pair.d.on_decode(Reply::Json(200, completion("x", 5, 3)));
    let mut said = vec!["hello"];
    for turn in 0..3 {
        assert_eq!(
            rig.client.post(CHAT, &chat(&said)).await.status,
            200,
            "turn {turn}"
        );
        said.extend(["answer", "more"]);
    }
    assert_eq!(
        pair.p.seen().len(),
        1,
        "only the first turn is prefilled elsewhere"
    );
    assert_eq!((pair.d.seen().len(), other.seen().len()), (3, 0));
    let shown = rig.client.get("/conversations").await.json();
    assert_eq!(
        (&shown["count"], &shown["conversations"][0]["turns"]),
        (&json!(1), &json!(3))
    );
    assert_eq!(shown["conversations"][0]["decode"], "d");
    assert_eq!(
        rig.client
            .post("/conversations/clear", &json!({}))
            .await
            .json()["cleared"],
        1
    );
    assert_eq!(rig.client.get("/conversations").await.json()["count"], 0);

    // The mode of the flag is shown and can be changed. An unknown mode changes nothing.
    assert_eq!(rig.client.get("/mode").await.json()["mode"], "ppd");
    assert_eq!(
        rig.client.post("/mode/pd", &json!({})).await.json()["mode"],
        "pd"
    );
    assert_eq!(
        rig.client.post("/mode/dp", &json!({})).await.error_code(),
        "no_such_mode"
    );
    // In the mode `pd`, each turn gets a prefill leg again.
    let before = pair.p.seen().len();
    for _ in 0..2 {
        assert_eq!(rig.client.post(CHAT, &chat(&said)).await.status, 200);
    }
    assert_eq!(pair.p.seen().len(), before + 2);
}

#[tokio::test]
async fn a_conversation_ends_with_its_instance() {
    let rig = Rig::start(&["--mode", "ppd", "--call-back-every", "100ms"]).await;
    let pair = rig.pair().await;
    assert_eq!(rig.client.post(CHAT, &chat(&["hello"])).await.status, 200);
    let listed = rig.client.get("/conversations").await.json();
    assert_eq!(listed["count"], 1);
    // The sidecar is not ready for a moment, so the engine may have been restarted with an empty cache.
    pair.d_sidecar
        .answer(crate::support::sidecar::Answer::Own { ready: false });
    rig.until_state("d", "not_ready").await;
    pair.d_sidecar
        .answer(crate::support::sidecar::Answer::Own { ready: true });
    rig.until_state("d", "ready").await;
    let listed = rig.client.get("/conversations").await.json();
    assert_eq!(listed["count"], 0);
    let later = chat(&["hello", "hi", "more"]);
    assert_eq!(rig.client.post(CHAT, &later).await.status, 200);
    assert_eq!(pair.p.seen().len(), 2, "a first turn again");
}

#[tokio::test]
async fn short_prompts_need_no_prefill_instance() {
    let rig = Rig::start(&["--mode", "auto"]).await;
    let pair = rig.pair().await;
    assert_eq!(rig.client.post(CHAT, &chat(&["hello"])).await.status, 200);
    assert_eq!(pair.p.seen().len(), 0);
    assert_eq!(rig.record().await["alone"], "cheaper");
    // If the decode instance is busy and the prompt is not cached, a transfer saves time for a long
    // prompt.
    pair.d.on_decode(Reply::Silence);
    let running: Vec<_> = (0..8)
        .map(|_| {
            let client = rig.client.clone();
            tokio::spawn(async move { client.post(CHAT, &chat(&["hello"])).await })
        })
        .collect();
    while pair.d.seen().len() < 9 {
        tokio::task::yield_now().await;
    }
    let client = rig.client.clone();
    let long = "word ".repeat(2000);
    let asked = tokio::spawn(async move { client.post(CHAT, &chat(&[&long])).await });
    while pair.p.seen().is_empty() {
        tokio::task::yield_now().await;
    }
    asked.abort();
    running.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn keys() {
    let flags = [
        "--api-key",
        "one,two",
        "--admin-key",
        "boss",
        "--engine-key",
        "inner",
    ];
    let rig = Rig::start(&flags).await;
    let (d, _sidecar) = rig
        .instance_unseen("d", crate::support::sidecar::Role::Decode)
        .await;
    let body = json!({"model": "m", "prompt": "hello"}).to_string();
    let ask = |key: &'static str| {
        let body = body.clone();
        let client = rig.client.clone();
        async move {
            client
                .post_with(COMPLETIONS, &[("authorization", key)], body)
                .await
        }
    };
    rig.until("/ready", |ready| ready["ready"] == true).await;
    assert_eq!(ask("Bearer three").await.error_code(), "invalid_api_key");
    assert_eq!(rig.client.get("/v1/models").await.status, 401);
    assert_eq!(ask("Bearer two").await.status, 200);
    assert_eq!(d.only().headers["authorization"], "Bearer inner");
    assert_eq!(
        rig.client.post("/mode/ppd", &json!({})).await.error_code(),
        "not_permitted"
    );
    let headers = [("authorization", "Bearer boss")];
    assert_eq!(
        rig.client.post_with("/mode/ppd", &headers, "").await.status,
        200
    );
}

/// Several keys of a file are valid at once, and the proxy reads a changed file while it runs.
#[tokio::test]
async fn keys_from_files() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let (new, path) = (folder.path().join("new"), folder.path().join(name));
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600)).unwrap();
        std::fs::rename(&new, &path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let api = write("api", "# clients\none\n\ntwo\n");
    let admin = write("admin", "boss\n");
    let engine = write("engine", "inner\n");
    let rig = Rig::start(&[
        "--api-key-file",
        &api,
        "--admin-key-file",
        &admin,
        "--engine-key-file",
        &engine,
    ])
    .await;
    let (d, _sidecar) = rig
        .instance_unseen("d", crate::support::sidecar::Role::Decode)
        .await;
    rig.until("/ready", |ready| ready["ready"] == true).await;
    let body = json!({"model": "m", "prompt": "hello"}).to_string();
    let post = async |path: &str, key: &str, body: String| {
        let key = format!("Bearer {key}");
        let headers = [("authorization", &*key)];
        let answer = rig.client.post_with(path, &headers, body).await;
        answer.status.as_u16()
    };
    let asks = async |key: &str| post(COMPLETIONS, key, body.clone()).await;
    let changes = async |key: &str| post("/mode/ppd", key, String::new()).await;
    let seen = || d.seen().last().unwrap().headers["authorization"].clone();
    for (key, status) in [("one", 200), ("two", 200), ("boss", 401)] {
        assert_eq!(asks(key).await, status, "{key}");
    }
    assert_eq!(seen(), "Bearer inner");
    assert_eq!((changes("boss").await, changes("one").await), (200, 403));

    write("engine", "other\n");
    write("admin", "chief\nboss\n");
    write("api", "two\nthree\n");
    let deadline = Instant::now() + Duration::from_secs(60);
    while asks("three").await != 200 || changes("chief").await != 200 || seen() != "Bearer other" {
        assert!(Instant::now() < deadline, "the files are not read again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!((asks("one").await, asks("two").await), (401, 200));
    assert_eq!(changes("boss").await, 200);
}

#[tokio::test]
async fn only_permitted_hosts_are_talked_to() {
    let rig = Rig::start(&["--allow", "10.0.0.0/8"]).await;
    let engine = Engine::alone("d").await;
    let named = json!({"role": "decode", "url": engine.url});
    assert_eq!(
        rig.client.post("/instances", &named).await.error_code(),
        "invalid_instance"
    );
    let sidecar = crate::support::sidecar::Sidecar::start(
        "d",
        crate::support::sidecar::Role::Decode,
        &engine.url,
        &rig.registration,
    );
    let sidecar = sidecar.await;
    rig.until_metric(
        "pd_proxy_registration_messages_total{kind=\"register_refused\"}",
        1.0,
    )
    .await;
    assert_eq!(rig.client.get("/instances").await.json(), json!([]));
    assert!(
        sidecar.calls.lock().unwrap().is_empty(),
        "not even called back"
    );
}

#[tokio::test]
async fn traces_reach_the_engines_and_the_collector() {
    let collector = Engine::alone("collector").await;
    let rig = Rig::start(&["--otlp", &collector.url]).await;
    let pair = rig.pair().await;
    let sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let body = json!({"model": "m", "prompt": "hello"}).to_string();
    let answer = rig
        .client
        .post_with(COMPLETIONS, &[("traceparent", sent)], body)
        .await;
    assert_eq!(answer.status, 200);
    let (p, d) = (pair.p.only(), pair.d.only());
    let passed = p.headers["traceparent"].to_str().unwrap();
    assert_eq!(passed, d.headers["traceparent"]);
    assert!(
        passed.starts_with(&sent[..36]) && passed != sent,
        "{passed}"
    );
    rig.until_metric("pd_proxy_spans_total{result=\"sent\"}", 3.0)
        .await;
    let got = collector.only();
    assert_eq!(got.path, "/v1/traces");
    let spans = got.json()["resourceSpans"][0]["scopeSpans"][0]["spans"].clone();
    assert_eq!(spans.as_array().unwrap().len(), 3, "{spans}");
    assert_eq!(spans[0]["spanId"], passed[36..52]);
    assert_eq!(spans[0]["parentSpanId"], sent[36..52]);
}

#[tokio::test]
async fn a_page_that_has_rebound_its_name_reads_nothing() {
    let rig = Rig::start(&[]).await;
    let keyed = Rig::start(&["--admin-key", "word"]).await;
    let read = async |rig: &Rig, headers: &[(&'static str, &str)]| {
        let mut codes = Vec::new();
        for path in ["/instances", "/requests"] {
            let answer = rig
                .client
                .open(Method::GET, path, headers, Bytes::new())
                .await;
            codes.push(answer.status.as_u16());
        }
        codes
    };
    let rebound = ("host", "rebound.example:8000");
    let key = ("authorization", "Bearer word");
    assert_eq!(read(&rig, &[rebound]).await, [403, 403]);
    assert_eq!(read(&keyed, &[rebound]).await, [403, 403]);
    assert_eq!(
        read(&rig, &[("sec-fetch-site", "cross-site")]).await,
        [403, 403]
    );
    assert_eq!(read(&keyed, &[rebound, key]).await, [200, 200]);
    // Programs on this host may read the pages, even through a proxy on this host. If there is an admin key, they need it.
    assert_eq!(read(&rig, &[]).await, [200, 200]);
    assert_eq!(read(&keyed, &[]).await, [403, 403]);
    let forwarded = ("x-forwarded-for", "10.1.2.3");
    assert_eq!(read(&rig, &[forwarded]).await, [200, 200]);
}

#[tokio::test]
async fn a_web_page_changes_nothing() {
    let rig = Rig::start(&[]).await;
    let engine = Engine::alone("d").await;
    let host = rig.client.base.strip_prefix("http://").unwrap().to_owned();
    let own = format!("http://{host}");
    let named = json!({"role": "decode", "url": engine.url, "id": "page"}).to_string();
    let json = ("content-type", "application/json");
    let pages: [&[(&'static str, &str)]; 7] = [
        &[
            ("content-type", "text/plain"),
            ("origin", "https://evil.example"),
        ],
        &[("content-type", "text/plain")],
        &[json, ("host", "evil.example")],
        &[
            json,
            ("host", "evil.example:8000"),
            ("origin", "http://evil.example:8000"),
        ],
        &[json, ("origin", "http://localhost:3000")],
        &[json, ("sec-fetch-site", "cross-site")],
        &[json, ("x-forwarded-for", "10.1.2.3")],
    ];
    let refusals = ["not_permitted", "unsupported_media_type"];
    for headers in pages {
        for (path, body) in [
            ("/instances", named.as_str()),
            ("/mode/ppd", "x"),
            ("/instances/d/drain", "x"),
            ("/conversations/clear", "x"),
        ] {
            let answer = rig.client.post_with(path, headers, body.to_owned()).await;
            let shown = format!("{path} {headers:?} {}", answer.text());
            assert!(answer.status.is_client_error(), "{shown}");
            assert!(refusals.contains(&answer.error_code().as_str()), "{shown}");
        }
    }
    // A form without a body has no content type, so it is recognised by its Origin.
    let form = [("origin", "null")];
    let answer = rig.client.post_with("/mode/ppd", &form, "").await;
    assert_eq!(answer.error_code(), "not_permitted");
    assert_eq!(rig.client.get("/instances").await.json(), json!([]));
    assert_eq!(rig.client.get("/mode").await.json()["mode"], "pd");
    rig.until_metric("pd_proxy_rejected_total{code=\"not_permitted\"}", 1.0)
        .await;

    // Programs of this host may still change the proxy, and the added instance serves.
    let same = [json, ("origin", own.as_str())];
    let added = rig.client.post_with("/instances", &same, named).await;
    assert_eq!(added.status, 201, "{}", added.text());
    rig.until_state("page", "ready").await;
    assert_eq!(rig.client.post_with("/mode/ppd", &[], "").await.status, 200);
    let body = json!({"model": "m", "prompt": "hello"}).to_string();
    let plain = [("content-type", "text/plain")];
    let refused = rig
        .client
        .post_with(COMPLETIONS, &plain, body.clone())
        .await;
    assert_eq!(
        (refused.status.as_u16(), refused.error_code().as_str()),
        (400, "unsupported_media_type")
    );
    assert!(engine.seen().is_empty());
    let served = rig.client.post_with(COMPLETIONS, &[], body).await;
    assert_eq!((served.status.as_u16(), engine.seen().len()), (200, 1));
}
