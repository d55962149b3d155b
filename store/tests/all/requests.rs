//! Each command, and the numbers of its answer.

use tokio::io::AsyncWriteExt;

use crate::client::{ABOUT, Answer, EXIST, GET, HEALTH, LIST, MIB, Running, body, bounds, sizes};

#[tokio::test]
async fn a_value_comes_back_with_its_numbers() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut client = store.connect().await;
    let value = body(1, MIB + 7);
    client.put("m@1@0@ab@half", &value).await;
    let got = client.ask(GET, "m@1@0@ab@half").await;
    assert_eq!(got.code, 200);
    let [format, dtype, location, a, b, c, d] = ABOUT;
    let length = i32::try_from(value.len()).unwrap();
    assert_eq!(
        got.numbers,
        [length, format, dtype, a, b, c, d, location],
        "the location is the last number"
    );
    assert_eq!(got.body, value);
    // Another connection sees the value, too.
    let mut other = store.connect().await;
    assert_eq!(other.ask(EXIST, "m@1@0@ab@half").await.code, 200);
    assert_eq!(other.ask(GET, "m@1@0@ab@half").await, got);
    let hits = store.metric(r#"pd_store_requests_total{operation="get",outcome="hit"}"#);
    assert_eq!(hits, Some(2.0));
    let sent = store.metric("pd_store_get_bytes_total");
    assert_eq!(sent, Some(2.0 * value.len() as f64));
    store.end().await;
}

#[tokio::test]
async fn what_is_not_there_is_answered_with_known_numbers() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut client = store.connect().await;
    // LMCache's client turns the numbers of each answer into a format and a type, so these must be known to it.
    let missing = Answer {
        code: 400,
        numbers: [0, 1, 2, 0, 0, 0, 0, 0],
        body: Vec::new(),
    };
    assert_eq!(client.ask(GET, "absent").await, missing);
    assert_eq!(client.ask(EXIST, "absent").await, missing);
    assert_eq!(client.ask(LIST, "").await, missing);
    assert_eq!(client.ask(HEALTH, "").await.code, 200);
    store.end().await;
}

#[tokio::test]
async fn a_second_put_replaces_the_value() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut client = store.connect().await;
    client.put("k", &body(1, 1000)).await;
    client.put("k", &body(2, 500)).await;
    assert_eq!(client.ask(GET, "k").await.body, body(2, 500));
    client.put("empty", b"").await;
    assert_eq!(client.ask(GET, "empty").await.body, b"");
    store.end().await;
}

#[tokio::test]
async fn a_value_ends_with_its_life() {
    let mut short = sizes(None);
    short.ttl = Some(std::time::Duration::ZERO);
    let store = Running::start(&short, bounds()).await;
    let mut client = store.connect().await;
    client.put("k", b"kv").await;
    assert_eq!(client.ask(EXIST, "k").await.code, 400);
    client.put("k", b"kv").await;
    assert_eq!(client.ask(GET, "k").await.code, 400);
    let ended = store.metric(r#"pd_store_requests_total{operation="get",outcome="expired"}"#);
    assert_eq!(ended, Some(1.0));
    store.end().await;
}

/// EXIST requests that arrive together are answered together. The answers keep their order, also around other commands.
#[tokio::test]
async fn requests_that_arrive_together_are_answered_in_their_order() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut client = store.connect().await;
    for i in 0..4 {
        client.put(&format!("k{i}"), &body(i, 100)).await;
    }
    let head = |command: i32, key: &str| {
        let numbers = [command, 0, 1, 2, 0, 0, 0, 0, 0].map(i32::to_le_bytes);
        [numbers.concat(), format!("{key:150}").into_bytes()].concat()
    };
    let asked = |i: usize| format!("k{}", i % 5);
    let mut sent: Vec<u8> = (0..150).flat_map(|i| head(EXIST, &asked(i))).collect();
    sent.extend(head(GET, "k3"));
    sent.extend((0..3).flat_map(|i| head(EXIST, &asked(i + 3))));
    client.0.write_all(&sent).await.unwrap();
    for i in 0..150 {
        let there = if i % 5 < 4 { 200 } else { 400 };
        assert_eq!(client.answer().await.code, there, "{i}");
    }
    assert_eq!(client.answer().await.body, body(3, 100));
    for there in [200, 400, 200] {
        assert_eq!(client.answer().await.code, there);
    }
    // A PUT behind them loses none of its bytes to the buffer of heads.
    let mut sent = head(EXIST, "k0");
    let numbers = [1, 50_000, 1, 2, 0, 0, 0, 0, 0].map(i32::to_le_bytes);
    sent.extend(numbers.concat());
    sent.extend(format!("{:150}", "large").into_bytes());
    sent.extend(body(9, 50_000));
    sent.extend(head(GET, "large"));
    client.0.write_all(&sent).await.unwrap();
    assert_eq!(client.answer().await.code, 200);
    assert_eq!(client.answer().await.body, body(9, 50_000));
    store.end().await;
}
