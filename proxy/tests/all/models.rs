//! Tests several models behind one proxy.

use http::Method;
use serde_json::{Value, json};

use crate::support::Rig;
use crate::support::engine::{Engine, Reply, completion};
use crate::support::sidecar::{Role, Sidecar};

const COMPLETIONS: &str = "/v1/completions";

/// Starts an instance that serves these models, and waits until the proxy knows them.
async fn instance(rig: &Rig, name: &str, role: Role, models: &[&str]) -> (Engine, Sidecar) {
    let engine = rig.engine(name).await;
    engine.set_models(models[0], &models[1..]);
    engine.on_decode(Reply::Json(200, completion(name, 5, 3)));
    let sidecar = Sidecar::start(name, role, &engine.url, &rig.registration).await;
    until_models(rig, name, models).await;
    rig.until_state(name, "ready").await;
    (engine, sidecar)
}

async fn until_models(rig: &Rig, name: &str, models: &[&str]) {
    rig.until("/instances", |all| {
        let all = all.as_array().unwrap();
        all.iter()
            .any(|i| i["id"] == name && i["models"] == json!(models))
    })
    .await;
}

fn ask(model: &str) -> Value {
    json!({"model": model, "prompt": "hello", "max_tokens": 3})
}

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn each_request_reaches_a_pair_of_its_model() {
    let rig = Rig::start(&["--model-mode", "b=ppd", "--model-decode-policy", "b=prefix"]).await;
    let (pa, _pa) = instance(&rig, "pa", Role::Prefill, &["a", "lora"]).await;
    let (pb, _pb) = instance(&rig, "pb", Role::Prefill, &["b"]).await;
    let (da, _da) = instance(&rig, "da", Role::Decode, &["a", "lora"]).await;
    let (db, _db) = instance(&rig, "db", Role::Decode, &["b"]).await;
    for (model, decode) in [("b", "db"), ("a", "da"), ("lora", "da"), ("b", "db")] {
        let answer = rig.client.post(COMPLETIONS, &ask(model)).await;
        assert_eq!(text(&answer.json()), decode, "{model}");
    }
    let names = |engine: &Engine| -> Vec<String> {
        let name = |seen: &crate::support::engine::Seen| seen.json()["model"].to_string();
        engine.seen().iter().map(name).collect()
    };
    assert_eq!(names(&da), ["\"a\"", "\"lora\""]);
    assert_eq!(names(&pa), ["\"a\"", "\"lora\""]);
    assert_eq!(names(&db), ["\"b\"", "\"b\""]);
    // The second request for `b` repeats the prompt. With `ppd` it goes straight to the decode instance.
    assert_eq!(names(&pb), ["\"b\""]);

    let mode = rig.client.get("/mode").await.json();
    assert_eq!(mode["models"]["a"]["mode"], "pd");
    assert_eq!(mode["models"]["b"]["mode"], "ppd");
    let changed = rig.client.post("/mode/pd?model=b", &json!({})).await;
    assert_eq!(changed.json(), json!({"mode": "pd", "model": "b"}));
    let nothing = rig.client.post("/mode/pd?model=c", &json!({})).await;
    assert_eq!(
        (nothing.status.as_u16(), &*nothing.error_code()),
        (404, "no_such_model")
    );

    rig.until_metric("pd_proxy_model_requests_total{model=\"b\"}", 2.0)
        .await;
    assert_eq!(
        rig.metric("pd_proxy_model_requests_total{model=\"a\"}")
            .await,
        2.0
    );
    assert_eq!(
        rig.metric("pd_proxy_model_transfers_total{model=\"b\"}")
            .await,
        1.0
    );
    assert_eq!(
        rig.metric("pd_proxy_model_alone_total{model=\"b\"}").await,
        1.0
    );
}

#[tokio::test]
async fn bodies_that_are_passed_on_reach_their_model() {
    let rig = Rig::start(&[]).await;
    let (a, _a) = instance(&rig, "a", Role::Decode, &["a"]).await;
    let (b, _b) = instance(&rig, "b", Role::Decode, &["b"]).await;
    let form = "--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nb\r\n--x--\r\n";
    let kind = ("content-type", "multipart/form-data; boundary=x");
    let audio = "/v1/audio/transcriptions";
    let answer = rig.client.post_with(audio, &[kind], form).await;
    assert_eq!(text(&answer.json()), "b");
    assert_eq!(b.only().text, form, "every byte arrives");
    for path in [
        "/v1/embeddings",
        "/tokenize",
        "/invocations",
        "/v1/messages",
    ] {
        let body = json!({"model": "b", "input": "x"});
        let asked = rig.client.post(path, &body);
        assert_eq!(asked.await.status, 200, "{path}");
    }
    assert_eq!((a.seen().len(), b.seen().len()), (0, 5));
    // A request without a model gets the first model.
    for _ in 0..2 {
        let answer = rig.client.post(COMPLETIONS, &json!({"prompt": "x"})).await;
        assert_eq!(text(&answer.json()), "a");
        let version = rig.client.get("/version").await;
        assert_eq!(text(&version.json()), "a");
    }
}

#[tokio::test]
async fn an_unknown_model_gets_the_engines_own_error_and_no_label() {
    let rig = Rig::start(&[]).await;
    let (a, _a) = instance(&rig, "a", Role::Decode, &["a"]).await;
    let (b, _b) = instance(&rig, "b", Role::Decode, &["b"]).await;
    let error = json!({"error": {"message": "The model `hostile` does not exist. Valid aliases: a.",
        "type": "NotFoundError", "param": "model", "code": 404}});
    a.on_decode(Reply::Json(404, error.clone()));
    let answer = rig.client.post(COMPLETIONS, &ask("hostile")).await;
    assert_eq!((answer.status.as_u16(), answer.json()), (404, error));
    assert_eq!((a.seen().len(), b.seen().len()), (1, 0));
    rig.until_metric("pd_proxy_model_requests_total{model=\"unknown\"}", 1.0)
        .await;
    let metrics = rig.client.get("/metrics").await.text();
    assert!(!metrics.contains("hostile"), "{metrics}");
}

#[tokio::test]
async fn the_list_of_models_is_the_union() {
    let rig = Rig::start(&[]).await;
    let (_a, _as) = instance(&rig, "a", Role::Decode, &["a"]).await;
    let (_a2, _a2s) = instance(&rig, "a2", Role::Decode, &["a", "lora"]).await;
    let (b, _bs) = instance(&rig, "b", Role::Decode, &["b"]).await;
    let (_p, _ps) = instance(&rig, "p", Role::Prefill, &["only-prefill"]).await;
    let ids = |list: &Value| -> Vec<String> {
        let data = list["data"].as_array().unwrap();
        data.iter()
            .map(|card| card["id"].as_str().unwrap().to_owned())
            .collect()
    };
    let headers = [("authorization", "Bearer secret")];
    let asked = rig
        .client
        .open(Method::GET, "/v1/models", &headers, "".into());
    let answer = asked.await.whole().await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["object"], "list");
    assert_eq!(ids(&answer.json()), ["a", "lora", "b"]);
    assert_eq!(b.only().headers["authorization"], "Bearer secret");
    rig.client.post("/instances/b/drain", &json!({})).await;
    rig.until("/instances", |all| {
        all.as_array()
            .unwrap()
            .iter()
            .any(|i| i["draining"] == true)
    })
    .await;
    let answer = rig.client.get("/v1/models").await;
    assert_eq!(ids(&answer.json()), ["a", "lora"]);
    let gone = rig.client.post(COMPLETIONS, &ask("b")).await;
    assert_eq!(
        (gone.status.as_u16(), &*gone.error_code()),
        (503, "no_decode_instance_ready")
    );
}

#[tokio::test]
async fn an_adapter_that_is_loaded_later_is_found() {
    let rig = Rig::start(&["--call-back-every", "50ms"]).await;
    let (_a, _as) = instance(&rig, "a", Role::Decode, &["a"]).await;
    let (b, _bs) = instance(&rig, "b", Role::Decode, &["b"]).await;
    b.set_models("b", &["new"]);
    until_models(&rig, "b", &["b", "new"]).await;
    let answer = rig.client.post(COMPLETIONS, &ask("new")).await;
    assert_eq!(text(&answer.json()), "b");
    b.set_models("b", &[]);
    until_models(&rig, "b", &["b"]).await;
    let answer = rig.client.post(COMPLETIONS, &ask("new")).await;
    assert_eq!(
        text(&answer.json()),
        "a",
        "the engine of the first model answers"
    );
}

#[tokio::test]
async fn configured_instances_and_configured_names() {
    let (a, b) = (Engine::alone("a").await, Engine::alone("b").await);
    a.set_models("a", &[]);
    b.on_decode(Reply::Json(200, completion("b", 5, 3)));
    let rig = Rig::start(&["--decode", &a.url]).await;
    let named = json!({"role": "decode", "url": b.url, "id": "b", "models": ["b", "alias"]});
    assert_eq!(rig.client.post("/instances", &named).await.status, 201);
    until_models(&rig, "b", &["b", "alias"]).await;
    rig.until_state("b", "ready").await;
    let id = a.url.strip_prefix("http://").unwrap();
    until_models(&rig, id, &["a"]).await;
    let answer = rig.client.post(COMPLETIONS, &ask("alias")).await;
    assert_eq!(text(&answer.json()), "b");
    assert_eq!(b.only().json()["model"], "alias");
    assert_eq!(a.seen().len(), 0);
}
