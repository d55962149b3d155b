//! Hostile and slow clients, and the limits of memory.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::client::{ABOUT, EXIST, GET, HEALTH, MIB, PUT, Running, body, bounds, sizes, until};

#[tokio::test]
async fn a_value_that_is_too_large_is_dropped_and_the_connection_goes_on() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut client = store.connect().await;
    client.put("large", &body(1, 2 * MIB + 1)).await;
    assert_eq!(client.ask(EXIST, "large").await.code, 400);
    client.put("", b"without a key").await;
    client.put("fits", &body(2, 2 * MIB)).await;
    assert_eq!(client.ask(GET, "fits").await.body, body(2, 2 * MIB));
    let refused = store.metric(r#"pd_store_requests_total{operation="put",outcome="refused"}"#);
    assert_eq!(refused, Some(2.0));
    store.end().await;
}

#[tokio::test]
async fn a_head_that_cannot_be_read_ends_only_its_connection() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut good = store.connect().await;
    good.put("k", b"kv").await;
    for (command, length) in [
        (0, 0),
        (6, 0),
        (-1, 0),
        (i32::MAX, 5),
        (PUT, -1),
        (PUT, i32::MIN),
    ] {
        let mut bad = store.connect().await;
        bad.head(command, length, ABOUT, "k").await;
        assert!(bad.is_closed().await, "{command} {length}");
    }
    let closed = r#"pd_store_connections_closed_total{reason="malformed"}"#;
    store.wait(closed, 6.0).await;
    assert_eq!(good.ask(GET, "k").await.body, b"kv");
    store.end().await;
}

#[tokio::test]
async fn a_client_that_leaves_within_a_value_stores_nothing() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut leaving = store.connect().await;
    leaving.head(PUT, 1000, ABOUT, "half").await;
    leaving.0.write_all(&[1; 500]).await.unwrap();
    drop(leaving);
    let closed = r#"pd_store_connections_closed_total{reason="lost"}"#;
    store.wait(closed, 1.0).await;
    let mut client = store.connect().await;
    assert_eq!(client.ask(EXIST, "half").await.code, 400);
    store.end().await;
}

#[tokio::test]
async fn values_beyond_the_memory_are_evicted() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut client = store.connect().await;
    for i in 0..100 {
        client.put(&format!("k{i}"), &body(i, MIB)).await;
        assert_eq!(client.ask(HEALTH, "").await.code, 200);
        assert!(store.cache.memory_bytes() <= 16 * MIB);
    }
    let mut found = 0;
    for i in 0..100 {
        found += u32::from(client.ask(EXIST, &format!("k{i}")).await.code == 200);
    }
    assert!(
        (8..=16).contains(&found),
        "{found} of 100 values of 1 MiB in 16 MiB"
    );
    store.end().await;
}

#[tokio::test]
async fn silent_clients_do_not_lock_out_others() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(store.connect().await);
    }
    let mut client = store.connect().await;
    client.put("k", b"kv").await;
    assert_eq!(client.ask(GET, "k").await.body, b"kv");
    assert!(silent[0].is_closed().await);
    let open = || store.metric("pd_store_connections").unwrap();
    until("16 connections at most", || open() <= 16.0).await;
    store.end().await;
}

/// Clients that read nothing take the room for values in flight: three quarters for each host. A GET of another client of
/// the same host waits, and is served when the room is free. A client of another host is served at once.
#[tokio::test]
async fn room_for_values_in_flight_is_bounded_and_comes_back() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut client = store.connect().await;
    client.put("k", &body(3, 2 * MIB)).await;
    assert_eq!(client.ask(EXIST, "k").await.code, 200);
    // Half of a value each: three values are the room of a host.
    let mut halves = Vec::new();
    for i in 0..4 {
        let mut half = store.connect().await;
        let length = i32::try_from(2 * MIB).unwrap();
        half.head(PUT, length, ABOUT, &format!("h{i}")).await;
        half.0.write_all(&vec![7; MIB]).await.unwrap();
        halves.push(half);
    }
    store
        .wait("pd_store_in_flight_bytes", 6.0 * MIB as f64)
        .await;
    let waits = tokio::time::timeout(Duration::from_millis(300), client.ask(GET, "k")).await;
    assert!(
        waits.is_err(),
        "a value was sent although there was no room"
    );
    // Further look-ups of this host wait, too. The other host has a loopback address of its own.
    let mut waiting = Vec::new();
    for _ in 0..8 {
        let mut client = store.connect().await;
        client.head(GET, 0, [1, 2, 0, 0, 0, 0, 0], "k").await;
        waiting.push(client);
    }
    let mut other = store.connect_from([127, 0, 0, 2]).await;
    assert_eq!(other.ask(GET, "k").await.body, body(3, 2 * MIB));
    other.put("o", b"kv").await;
    assert_eq!(other.ask(GET, "o").await.body, b"kv");
    drop((halves, waiting));
    // The answer to the request that waited comes now.
    assert_eq!(client.answer().await.body, body(3, 2 * MIB));
    store.end().await;
}

#[tokio::test]
async fn a_request_that_has_begun_ends_before_the_store_stops() {
    let store = Running::start(&sizes(None), bounds()).await;
    let mut idle = store.connect().await;
    assert_eq!(idle.ask(HEALTH, "").await.code, 200);
    let mut busy = store.connect().await;
    busy.head(PUT, 1000, ABOUT, "k").await;
    busy.0.write_all(&[9; 500]).await.unwrap();
    store.wait("pd_store_in_flight_bytes", 1000.0).await;
    store.stop();
    assert!(idle.is_closed().await);
    busy.0.write_all(&[9; 500]).await.unwrap();
    let cache = store.port_ended().await;
    let found = cache.get(&b"k".to_vec()).await.unwrap();
    assert_eq!(found.entry().body, vec![9; 1000]);
}
