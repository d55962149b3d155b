//! Requests and answers as clients of one plain vLLM know them.

mod support;

use serde_json::json;
use support::Rig;
use support::engine::Reply;

const COMPLETIONS: &str = "/v1/completions";

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

    // One that is known would be refused by the decode engine as well.
    let body = json!({"model": "other", "prompt": "hello"});
    let answer = rig.client.post(COMPLETIONS, &body).await;
    assert_eq!((answer.status.as_u16(), answer.json()), (400, refusal));
    pair.d.only();
}
