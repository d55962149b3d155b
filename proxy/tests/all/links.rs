//! Tests of connections to engines: the proxy reuses a working connection, and passes on chunks that came
//! together in one write.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use crate::support::Rig;
use crate::support::engine::events;

const COMPLETIONS: &str = "/v1/completions";

/// An engine that sends fixed bytes, and that notes the connection of each request.
struct Plain {
    url: String,
    /// The connection of each `POST`, counted from zero.
    posts: Arc<Mutex<Vec<usize>>>,
    _server: AbortOnDropHandle<()>,
}

impl Plain {
    /// Starts an engine that answers `POST` with these bytes. The engine closes each connection after
    /// `requests` requests, without announcing the end.
    async fn start(answer: Vec<u8>, requests: usize) -> Self {
        Self::closing(answer, requests, false).await
    }

    /// Starts an engine as [`Plain::start`] does. With `reads`, the engine closes a connection only when the
    /// next request has come.
    async fn closing(answer: Vec<u8>, requests: usize, reads: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        Self::over(listener, url, answer, requests, reads)
    }

    fn over(
        listener: TcpListener,
        url: String,
        answer: Vec<u8>,
        requests: usize,
        reads: bool,
    ) -> Self {
        let posts = Arc::<Mutex<Vec<_>>>::default();
        let seen = Arc::clone(&posts);
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            for number in 0.. {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (answer, seen) = (answer.clone(), Arc::clone(&seen));
                connections.spawn(async move {
                    for _ in 0..requests {
                        let Some(head) = request(&mut stream).await else {
                            return;
                        };
                        if head.starts_with("POST") {
                            seen.lock().unwrap().push(number);
                            stream.write_all(&answer).await.unwrap();
                        } else {
                            let ok = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}";
                            stream.write_all(ok).await.unwrap();
                        }
                    }
                    if reads {
                        request(&mut stream).await;
                    }
                });
            }
        });
        Self {
            url,
            posts,
            _server: AbortOnDropHandle::new(server),
        }
    }
}

/// Reads the next request, with its body, and returns its head. Returns `None` at the end of the connection.
async fn request(stream: &mut TcpStream) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
        let text = String::from_utf8(bytes.clone()).unwrap();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("content-length: "));
        if body.len() == length.map_or(0, |length| length.parse().unwrap()) {
            return Some(head.to_owned());
        }
    }
}

fn whole() -> Vec<u8> {
    let body = json!({"choices": [{"index": 0, "text": "hello"}]}).to_string();
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}").into()
}

fn prompt() -> Value {
    json!({"model": "m", "prompt": "hello", "max_tokens": 8})
}

async fn rig(engine: &Plain) -> Rig {
    let rig = Rig::start(&["--decode", &engine.url, "--call-back-every", "1h"]).await;
    let name = engine.url.strip_prefix("http://").unwrap();
    rig.until_state(name, "ready").await;
    rig
}

#[tokio::test]
async fn a_connection_is_used_again() {
    let engine = Plain::start(whole(), usize::MAX).await;
    let rig = rig(&engine).await;
    for _ in 0..5 {
        assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
    }
    // All requests used the connection of the health check.
    assert_eq!(*engine.posts.lock().unwrap(), [0; 5]);
}

/// The zone is the number of the loopback interface, which the kernel accepts for `::1`, too.
#[tokio::test]
async fn an_address_with_a_zone_is_connected_to() {
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let url = format!("http://[::1%1]:{}", listener.local_addr().unwrap().port());
    let engine = Plain::over(listener, url, whole(), usize::MAX, false);
    let rig = rig(&engine).await;
    assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
    assert_eq!(*engine.posts.lock().unwrap(), [0]);
}

#[tokio::test]
async fn one_that_the_engine_has_closed_is_not() {
    let engine = Plain::start(whole(), 1).await;
    let rig = rig(&engine).await;
    for _ in 0..3 {
        // Wait until the proxy has seen the end of the last connection.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(rig.client.post(COMPLETIONS, &prompt()).await.status, 200);
    }
    // The first two connections served the health check and the list of models.
    assert_eq!(*engine.posts.lock().unwrap(), [2, 3, 4]);
    assert_eq!(rig.metric("pd_proxy_decode_retries_total").await, 0.0);
}

#[tokio::test]
async fn one_that_is_closed_as_the_request_comes_is_replaced_by_a_fresh_one() {
    let engine = Plain::closing(whole(), 3, true).await;
    let rig = rig(&engine).await;
    // The first connection serves the health check, the list of models and one request. The proxy sends the
    // second request first over this connection and then over a fresh connection.
    for _ in 0..3 {
        let answer = rig.client.post(COMPLETIONS, &prompt()).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    assert_eq!(*engine.posts.lock().unwrap(), [0, 1, 1]);
    assert_eq!(rig.metric("pd_proxy_decode_retries_total").await, 0.0);
}

#[tokio::test]
async fn chunks_that_have_come_together_go_together() {
    let mut answer = String::from(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
    );
    let events = events(&["a", "b", "c", "d"]);
    for event in &events {
        answer += &format!("{:x}\r\n{event}\r\n", event.len());
    }
    answer += "0\r\n\r\n";
    let engine = Plain::start(answer.into(), usize::MAX).await;
    let rig = rig(&engine).await;
    for _ in 0..2 {
        let body = json!({"model": "m", "prompt": "hello", "stream": true});
        let mut stream = rig.client.stream(COMPLETIONS, &body).await;
        assert_eq!(stream.chunk().await, Some(Ok(events.concat())));
        assert_eq!(stream.chunk().await, None);
    }
    assert_eq!(*engine.posts.lock().unwrap(), [0; 2]);
}
