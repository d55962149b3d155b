//! Tests many requests at once, with engines that fail and clients that leave: each request ends, and leaves
//! nothing behind.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::support::engine::{Reply, Then, completion, events};
use crate::support::sidecar::Role;
use crate::support::{PATIENCE, Rig};

#[tokio::test]
async fn nothing_is_left() {
    let flags = ["--idle-timeout", "100ms", "--max-in-flight", "64"];
    let rig = Rig::start(&flags).await;
    let (p1, p1_sidecar) = rig.instance("p1", Role::Prefill).await;
    let (p2, _p2_sidecar) = rig.instance("p2", Role::Prefill).await;
    let (d1, _d1_sidecar) = rig.instance("d1", Role::Decode).await;
    let (d2, _d2_sidecar) = rig.instance("d2", Role::Decode).await;
    // The seed is fixed, so that a failure can be repeated.
    let mut random = StdRng::seed_from_u64(7);
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..60 {
        for engine in [&p1, &p2] {
            engine.on_prefill(match random.random_range(0..6) {
                0 => Reply::Die,
                1 => Reply::Json(500, json!({})),
                2 => Reply::Json(400, json!({})),
                _ => Reply::Json(200, completion("x", 5, 1)),
            });
        }
        for engine in [&d1, &d2] {
            engine.on_decode(match random.random_range(0..6) {
                0 => Reply::Die,
                1 => Reply::Json(503, json!({})),
                2 => Reply::Stream(events(&["a"])[..1].to_vec(), Then::Hang),
                _ => Reply::Stream(events(&["a", "b", "c"]), Then::End),
            });
        }
        let mut asked = JoinSet::new();
        for i in 0..5 {
            let client = rig.client.clone();
            // Two of five clients leave early.
            let stay = match i {
                0..2 => Duration::from_millis(random.random_range(1..30)),
                _ => PATIENCE,
            };
            // Only a client without a stream gets the refusal of a prefill engine.
            let is_stream = i != 4;
            asked.spawn(async move {
                let body = json!({"prompt": "hello", "stream": is_stream});
                let answer = client.post("/v1/completions", &body);
                match timeout(stay, answer).await {
                    Ok(answer) if answer.text().contains("error") => "error event".to_owned(),
                    Ok(answer) => answer.status.to_string(),
                    Err(_) => "left".to_owned(),
                }
            });
        }
        // Report the start of one request, so that its decode leg runs at the same time as its prefill leg.
        if let Some(seen) = p1.seen().last() {
            p1_sidecar.progress(&seen.id()).await;
        }
        while let Some(end) = asked.join_next().await {
            *ends.entry(end.unwrap()).or_default() += 1;
        }
    }
    assert_eq!(ends.values().sum::<u32>(), 300, "{ends:?}");
    // Each kind of end must have happened, so that the test covers every kind.
    for end in [
        "200 OK",
        "400 Bad Request",
        "error event",
        "503 Service Unavailable",
    ] {
        assert!(ends.contains_key(end), "none ended with {end}: {ends:?}");
    }
    let none_in_flight = async {
        while rig.metric("pd_proxy_in_flight_requests").await > 0.0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, none_in_flight)
        .await
        .expect("every request ends");
    // From now on all engines work.
    for engine in [&p1, &p2, &d1, &d2] {
        engine.on_prefill(Reply::Json(200, completion("x", 5, 1)));
        engine.on_decode(Reply::Json(200, completion("hello", 5, 3)));
    }
    // Every place is free again, so 64 requests at once are served.
    let mut asked = JoinSet::new();
    for _ in 0..64 {
        let client = rig.client.clone();
        asked.spawn(async move {
            client
                .post("/v1/completions", &json!({"prompt": "x"}))
                .await
        });
    }
    while let Some(answer) = asked.join_next().await {
        assert_eq!(answer.unwrap().status, 200);
    }
    assert_eq!(rig.end().await, proxy::End::Drained);
}
