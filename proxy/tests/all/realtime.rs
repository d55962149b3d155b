//! `/v1/realtime`: a WebSocket that passes through the proxy.

use std::sync::{Arc, Mutex};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::support::{PATIENCE, Rig};

/// An engine that speaks raw HTTP. It agrees to WebSockets, and sends back every byte of a session.
struct Echo {
    url: String,
    /// The heads of the requests for sessions.
    heads: Arc<Mutex<Vec<String>>>,
    _server: AbortOnDropHandle<()>,
}

impl Echo {
    /// Starts an engine whose answer to a request for a session begins with `answer`.
    async fn start(model: &'static str, answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let heads = Arc::default();
        let seen = Arc::clone(&heads);
        let server = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, model, answer, Arc::clone(&seen)));
            }
        });
        Self {
            url,
            heads,
            _server: AbortOnDropHandle::new(server),
        }
    }

    fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

async fn serve(
    mut stream: TcpStream,
    model: &str,
    answer: &str,
    heads: Arc<Mutex<Vec<String>>>,
) -> std::io::Result<()> {
    loop {
        let head = head(&mut stream).await?;
        if !head.contains("/v1/realtime") {
            let body = format!(r#"{{"data": [{{"id": "{model}"}}]}}"#);
            let all = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(all.as_bytes()).await?;
            continue;
        }
        heads.lock().unwrap().push(head);
        stream.write_all(answer.as_bytes()).await?;
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer).await? {
                0 => return Ok(()),
                count => stream.write_all(&buffer[..count]).await?,
            }
        }
    }
}

/// Reads up to the end of a head.
async fn head(stream: &mut TcpStream) -> std::io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8(head).unwrap())
}

const AGREES: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                      sec-websocket-accept: yes\r\n\r\n";
const REFUSES: &str =
    "HTTP/1.1 403 Forbidden\r\ncontent-type: text/plain\r\ncontent-length: 3\r\n\r\nno!";

/// Asks the proxy for a session. Returns the connection and the head of the answer.
async fn ask(rig: &Rig, query: &str, more: &str) -> (TcpStream, String) {
    let address = rig.client.base.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let asked = format!(
        "GET /v1/realtime{query} HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
         sec-websocket-key: k\r\nsec-websocket-version: 13\r\n{more}\r\n"
    );
    stream.write_all(asked.as_bytes()).await.unwrap();
    let head = timeout(PATIENCE, head(&mut stream)).await.unwrap().unwrap();
    (stream, head)
}

/// Sends a text through the session, and reads the same text back.
async fn echo(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    let mut back = vec![0; text.len()];
    timeout(PATIENCE, stream.read_exact(&mut back))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(back, text.as_bytes());
}

/// Starts a proxy in front of these engines, and waits until their models are known.
async fn rig(engines: &[&Echo], flags: &[&str]) -> Rig {
    let urls: Vec<_> = engines.iter().map(|engine| engine.url.as_str()).collect();
    let rig = Rig::start(&[&["--decode", &urls.join(",")], flags].concat()).await;
    rig.until("/instances", |all| {
        let known = |one: &Value| {
            one["standing"]["state"] == "ready"
                && one["models"].as_array().is_some_and(|all| !all.is_empty())
        };
        all.as_array()
            .unwrap()
            .iter()
            .filter(|one| known(one))
            .count()
            == engines.len()
    })
    .await;
    rig
}

#[tokio::test]
async fn a_session_passes_bytes_both_ways_and_ends_with_its_client() {
    let (one, other) = (
        Echo::start("one", AGREES).await,
        Echo::start("other", AGREES).await,
    );
    let flags = ["--api-key", "secret", "--engine-key", "inner"];
    let rig = rig(&[&one, &other], &flags).await;
    let key = "authorization: Bearer secret\r\nx-request-id: mine\r\n";
    let (mut session, head) = ask(&rig, "?model=other", key).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(head.contains("sec-websocket-accept: yes"), "{head}");
    assert!(head.contains("x-request-id: mine-"), "{head}");
    // The instance of the named model has got the client's handshake, with the key of the engines.
    assert!(one.heads().is_empty());
    let asked = other.heads()[0].to_ascii_lowercase();
    for part in [
        "get /v1/realtime?model=other http/1.1",
        "upgrade: websocket",
        "sec-websocket-key: k",
        "bearer inner",
        "x-request-id: mine-",
    ] {
        assert!(asked.contains(part), "{part} in {asked}");
    }
    echo(&mut session, "audio").await;
    echo(&mut session, &"more ".repeat(40_000)).await;
    assert!((rig.metric("pd_proxy_in_flight_requests").await - 1.0).abs() < f64::EPSILON);
    drop(session);
    let record = rig.record().await;
    assert_eq!(record["endpoint"], "/v1/realtime");
    assert_eq!(record["outcome"], "done");
    assert_eq!(record["alone"], "passed_on");
    assert!(rig.metric("pd_proxy_in_flight_requests").await.abs() < f64::EPSILON);
    let (_, head) = ask(&rig, "", "").await;
    assert!(head.starts_with("HTTP/1.1 401"), "{head}");
}

#[tokio::test]
async fn a_session_needs_an_instance_that_agrees() {
    let refusing = Echo::start("m", REFUSES).await;
    let rig = rig(&[&refusing], &[]).await;
    let (mut refused, head) = ask(&rig, "", "").await;
    assert!(head.starts_with("HTTP/1.1 403"), "{head}");
    let mut body = [0; 3];
    timeout(PATIENCE, refused.read_exact(&mut body))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&body, b"no!");
    let record = rig.record().await;
    assert_eq!(
        (&record["outcome"], &record["status"]),
        (&"refused".into(), &403.into())
    );
    let plain = rig.client.get("/v1/realtime").await;
    assert_eq!(plain.status, 404);
    assert!(
        plain.text().contains("Upgrade: websocket"),
        "{}",
        plain.text()
    );
}

#[tokio::test]
async fn a_proxy_that_drains_ends_sessions_that_do_not_end() {
    let engine = Echo::start("m", AGREES).await;
    let rig = rig(&[&engine], &["--drain-timeout", "200ms"]).await;
    let (mut session, _) = ask(&rig, "", "").await;
    echo(&mut session, "audio").await;
    assert_eq!(rig.end().await, proxy::End::ForcedShutdown);
    let mut rest = Vec::new();
    // The session ends with the end of its connection, or with a reset.
    drop(
        timeout(PATIENCE, session.read_to_end(&mut rest))
            .await
            .unwrap(),
    );
    assert!(rest.is_empty());
}
