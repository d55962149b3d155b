//! Tests with real metadata servers: the etcd and Redis programs whose paths are in `PD_TEST_ETCD` and `PD_TEST_REDIS`,
//! and an HTTP server with the interface of Mooncake's server.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use discovery::{Metadata, PROXY_KEY, Store, StoreError};

/// Ports for the tests of all crates.
#[path = "../../common/tests/all/ports.rs"]
mod ports;

use ports::free_port;

/// A server with its own data folder. The server is stopped at the end of the test.
struct Server(
    Child,
    #[expect(dead_code, reason = "removed when it is dropped")] tempfile::TempDir,
);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Starts the program whose path is in an environment variable. Prints a note and returns `None` if the variable is
/// empty.
fn start(variable: &str, arguments: impl Fn(&str) -> Vec<String>) -> Option<Server> {
    let program = std::env::var(variable).unwrap_or_default();
    if program.is_empty() {
        assert!(
            std::env::var_os("PD_REQUIRE_METADATA").is_none(),
            "{variable} names no program"
        );
        eprintln!("SKIPPED: {variable} names no program; `make unit` fetches one");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let child = Command::new(program)
        .args(arguments(folder.path().to_str().unwrap()))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Some(Server(child, folder))
}

fn store(server: &str, backend: &str) -> Store {
    Store::new(Metadata::parse(server, Some(backend)).unwrap().unwrap())
}

/// Waits until the server answers. Fails after a minute.
async fn up(store: &Store) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = store.find(PROXY_KEY).await {
        assert!(Instant::now() < deadline, "{error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn check(store: &Store, forgets: bool) {
    up(store).await;
    assert_eq!(store.find(PROXY_KEY).await.unwrap(), None);
    for value in ["10.0.0.1:7500", "[::1]:7501"] {
        let holds = Duration::from_secs(5);
        store.publish(PROXY_KEY, value, holds).await.unwrap();
        let found = store.find(PROXY_KEY).await.unwrap();
        assert_eq!(found.as_deref(), Some(value));
    }
    if forgets {
        let deadline = Instant::now() + Duration::from_secs(60);
        while store.find(PROXY_KEY).await.unwrap().is_some() {
            assert!(Instant::now() < deadline, "the key does not expire");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test]
async fn etcd() {
    let (client, peer) = (free_port(), free_port());
    let url = |port: u16| format!("http://127.0.0.1:{port}");
    let server = start("PD_TEST_ETCD", |folder| {
        let pairs = [
            ("--name", "one".to_owned()),
            ("--data-dir", folder.to_owned()),
            ("--listen-client-urls", url(client)),
            ("--advertise-client-urls", url(client)),
            ("--listen-peer-urls", url(peer)),
            ("--initial-advertise-peer-urls", url(peer)),
            ("--initial-cluster", format!("one={}", url(peer))),
        ];
        pairs
            .into_iter()
            .flat_map(|(name, value)| [name.to_owned(), value])
            .collect()
    });
    if server.is_some() {
        check(&store(&format!("127.0.0.1:{client}"), "etcd"), true).await;
    }
}

#[tokio::test]
async fn redis() {
    let port = free_port();
    let server = start("PD_TEST_REDIS", |folder| {
        let line = format!("--port {port} --bind 127.0.0.1 --save  --dir {folder}");
        line.split(' ').map(str::to_owned).collect()
    });
    if server.is_some() {
        check(&store(&format!("redis://127.0.0.1:{port}"), "redis"), true).await;
    }
}

#[tokio::test]
async fn http() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut keys = HashMap::new();
        for stream in listener.incoming() {
            answer(stream.unwrap(), &mut keys);
        }
    });
    check(
        &store(&format!("http://127.0.0.1:{port}/metadata"), "http"),
        false,
    )
    .await;
}

/// Answers the only request of a connection: GET or PUT of `/metadata?key=K`.
fn answer(stream: TcpStream, keys: &mut HashMap<String, Vec<u8>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let (mut line, mut length) = (String::new(), 0);
    reader.read_line(&mut line).unwrap();
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if header.trim().is_empty() {
            break;
        }
    }
    let key = line
        .split(' ')
        .nth(1)
        .unwrap()
        .strip_prefix("/metadata?key=")
        .unwrap()
        .to_owned();
    let (status, body) = if line.starts_with("PUT") {
        let mut body = vec![0; length];
        reader.read_exact(&mut body).unwrap();
        keys.insert(key, body);
        ("200 OK", b"metadata updated".to_vec())
    } else {
        match keys.get(&key) {
            Some(value) => ("200 OK", value.clone()),
            None => ("404 Not Found", b"metadata not found".to_vec()),
        }
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let mut stream = stream;
    stream
        .write_all(&[head.into_bytes(), body].concat())
        .unwrap();
}

#[tokio::test]
async fn nobody_there_is_said_within_the_bound() {
    let port = free_port();
    for backend in ["etcd", "redis", "http"] {
        let began = Instant::now();
        let error = store(&format!("127.0.0.1:{port}"), backend)
            .find(PROXY_KEY)
            .await
            .unwrap_err();
        assert!(
            matches!(error, StoreError::Unreachable { .. }),
            "{backend}: {error}"
        );
        assert!(began.elapsed() < Duration::from_secs(30), "{backend}");
    }
}
