//! Tests that no prompt is computed twice without notice. A request gets no prefill leg if its pair does not
//! fit, if an engine moves no KV, or if a refusal will repeat. `/instances` shows the reason.

use protocol::{Layout, Reason};
use serde_json::{Value, json};

use crate::support::engine::{Engine, Reply, completion};
use crate::support::sidecar::{Answer, Sidecar};
use crate::support::{Pair, Rig};

const COMPLETIONS: &str = "/v1/completions";

fn layers(layers: u32) -> Layout {
    Layout {
        model: "m".into(),
        dtype: "float".into(),
        layers,
        kv_heads: 2,
        head_size: 64,
        mla: false,
        chunk_tokens: 256,
        ..Layout::example()
    }
}

fn ask(model: &str) -> Value {
    json!({"model": model, "prompt": "hello", "max_tokens": 8})
}

/// Makes the sidecar report `count` layers of KV from now on, and waits until the proxy shows the number.
async fn says_layers(rig: &Rig, sidecar: &mut Sidecar, count: u32) {
    sidecar.register.layout = Some(layers(count));
    sidecar.beat();
    shows(rig, &sidecar.register.id, |instance| {
        instance["layout"]["layers"] == count
    })
    .await;
}

async fn shows(rig: &Rig, id: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let find = |all: &Value| {
        let all = all.as_array().unwrap();
        all.iter().find(|i| i["id"] == id).cloned()
    };
    let all = rig
        .until("/instances", |all| find(all).is_some_and(|i| holds(&i)))
        .await;
    find(&all).unwrap()
}

/// Sends a request through the proxy and returns its record.
async fn answered(rig: &Rig, body: &Value, earlier: usize) -> Value {
    let answer = rig.client.post(COMPLETIONS, body).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.json()["choices"][0]["text"], "hello");
    let enough = |all: &Value| all.as_array().unwrap().len() > earlier;
    rig.until("/requests", enough).await[earlier].clone()
}

fn legs(engine: &Engine) -> usize {
    engine.seen().len()
}

#[tokio::test]
async fn a_pair_of_four_and_five_layers_is_no_pair() {
    let rig = Rig::start(&[]).await;
    let mut pair = rig.pair().await;
    says_layers(&rig, &mut pair.p_sidecar, 4).await;
    says_layers(&rig, &mut pair.d_sidecar, 5).await;
    let record = answered(&rig, &ask("m"), 0).await;
    assert_eq!(record["alone"], "unfit", "{record}");
    assert_eq!(legs(&pair.p), 0, "nothing is computed twice");
    let shown = shows(&rig, "d", |d| d["unfit"][0]["with"] == "p").await;
    let why = shown["unfit"][0]["why"].as_str().unwrap();
    assert!(
        why.starts_with("layers is 4 on the prefill side and 5 on the decode side:"),
        "{why}"
    );
    // The engine is restarted without its draft model, behind the same sidecar.
    says_layers(&rig, &mut pair.d_sidecar, 4).await;
    let record = answered(&rig, &ask("m"), 1).await;
    assert_eq!((record["alone"].as_str(), legs(&pair.p)), (None, 1));
}

#[tokio::test]
async fn an_instance_that_moves_nothing_is_served_without_a_prefill_leg() {
    let rig = Rig::start(&[]).await;
    let mut pair = rig.pair().await;
    pair.d_sidecar.register.unmoved = "layers.1: heads of two sizes".into();
    pair.d_sidecar.beat();
    let shown = shows(&rig, "d", |d| {
        d["unmoved"] == "layers.1: heads of two sizes"
    })
    .await;
    assert_eq!(shown["standing"]["state"], "ready");
    let record = answered(&rig, &ask("m"), 0).await;
    assert_eq!(
        (record["alone"].as_str(), legs(&pair.p)),
        (Some("unfit"), 0)
    );
    // If another decode instance fits a prefill instance, the proxy chooses it.
    let (e, _sidecar) = rig
        .instance("e", crate::support::sidecar::Role::Decode)
        .await;
    for earlier in 1..4 {
        let record = answered(&rig, &ask("m"), earlier).await;
        assert_eq!(
            (record["alone"].as_str(), record["decode"].as_str()),
            (None, Some("e"))
        );
    }
    assert_eq!((legs(&pair.p), legs(&e), legs(&pair.d)), (3, 3, 1));
}

#[tokio::test]
async fn the_release_of_a_sidecar_is_shown_and_excludes_no_pair() {
    let rig = Rig::start(&[]).await;
    let mut pair = rig.pair().await;
    pair.d_sidecar.register.release = "9.9.9".into();
    pair.d_sidecar.beat();
    let shown = shows(&rig, "d", |d| d["release"] == "9.9.9").await;
    assert_eq!(shown["standing"]["state"], "ready");
    let record = answered(&rig, &ask("m"), 0).await;
    assert_eq!((record["alone"].as_str(), legs(&pair.p)), (None, 1));
}

async fn refusing(reason: &str) -> (Rig, Pair) {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    let refused = json!({"kv_transfer_params": {"pushed": false, "reason": reason}});
    pair.p.on_prefill(Reply::Json(200, refused));
    (rig, pair)
}

#[tokio::test]
async fn the_second_request_of_an_adapter_sends_no_prefill_leg() {
    let (rig, pair) = refusing("lora").await;
    let record = answered(&rig, &ask("adapter"), 0).await;
    assert_eq!(
        (record["alone"].as_str(), legs(&pair.p)),
        (Some("not_pushed"), 1)
    );
    let record = answered(&rig, &ask("adapter"), 1).await;
    assert_eq!(
        (record["alone"].as_str(), legs(&pair.p)),
        (Some("refused_before"), 1)
    );
    let shown = shows(&rig, "p", |p| p["refuses"].is_array()).await;
    assert_eq!(
        (
            &shown["refuses"][0]["requests"],
            &shown["refuses"][0]["reason"]
        ),
        (&json!("model \"adapter\""), &json!("lora"))
    );
    // Requests of the base model still get a prefill leg.
    pair.p.on_prefill(Reply::Json(200, completion("x", 5, 1)));
    let record = answered(&rig, &ask("m"), 2).await;
    assert_eq!((record["alone"].as_str(), legs(&pair.p)), (None, 2));
    // An engine that was not ready for a moment may have been restarted, so its refusals are forgotten.
    pair.p_sidecar.answer(Answer::Own { ready: false });
    pair.p.set_health(500);
    rig.until_state("p", "not_ready").await;
    pair.p_sidecar.answer(Answer::Own { ready: true });
    pair.p.set_health(200);
    rig.until_state("p", "ready").await;
    let record = answered(&rig, &ask("adapter"), 3).await;
    assert_eq!((record["alone"].as_str(), legs(&pair.p)), (None, 3));
}

#[tokio::test]
async fn the_second_request_of_a_kind_sends_no_prefill_leg() {
    let (rig, pair) = refusing("prompt_logprobs").await;
    let mut odd = ask("m");
    odd["vllm_xargs"] = json!({"skip": true});
    answered(&rig, &odd, 0).await;
    odd["prompt"] = json!("another");
    let record = answered(&rig, &odd, 1).await;
    assert_eq!(
        (record["alone"].as_str(), legs(&pair.p)),
        (Some("refused_before"), 1)
    );
    pair.p.on_prefill(Reply::Json(200, completion("x", 5, 1)));
    let record = answered(&rig, &ask("m"), 2).await;
    assert_eq!((record["alone"].as_str(), legs(&pair.p)), (None, 2));
}

#[tokio::test]
async fn what_passes_by_itself_is_asked_again() {
    let (rig, pair) = refusing("duplicate").await;
    answered(&rig, &ask("m"), 0).await;
    let record = answered(&rig, &ask("m"), 1).await;
    assert_eq!(
        (record["alone"].as_str(), legs(&pair.p)),
        (Some("not_pushed"), 2)
    );
}

/// A sidecar of an older release does not report its layout. The proxy learns from the sender's notice that
/// the pair does not fit.
#[tokio::test]
async fn a_pair_that_the_sender_cannot_link_is_learned() {
    let rig = Rig::start(&[]).await;
    let pair = rig.pair().await;
    pair.p.on_prefill(Reply::Held(200, completion("x", 5, 1)));
    let client = rig.client.clone();
    let asked = tokio::spawn(async move { client.post(COMPLETIONS, &ask("m")).await });
    rig.journal.until("p prefill").await;
    let id = pair.p.only().id();
    pair.p_sidecar
        .moved(&id, 0, Some(Reason::LayoutMismatch))
        .await;
    rig.until_metric(
        "pd_proxy_registration_messages_total{kind=\"proxy_notif\"}",
        1.0,
    )
    .await;
    pair.p.release();
    assert_eq!(asked.await.unwrap().status, 200);
    let record = answered(&rig, &ask("m"), 1).await;
    assert_eq!(
        (record["alone"].as_str(), legs(&pair.p)),
        (Some("refused_before"), 1)
    );
    let shown = shows(&rig, "p", |p| p["refuses"].is_array()).await;
    assert_eq!(shown["refuses"][0]["decode"], "d");
}
