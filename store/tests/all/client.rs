//! A store in this process, and a client of its port.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use store::cache::{Cache, Disk, Sizes};
use store::lm::{Bounds, RESPONSE_BYTES, Server};
use store::metrics::{Metrics, text};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) const PUT: i32 = 1;
pub(crate) const GET: i32 = 2;
pub(crate) const EXIST: i32 = 3;
pub(crate) const LIST: i32 = 4;
pub(crate) const HEALTH: i32 = 5;

pub(crate) const MIB: usize = 1 << 20;

pub(crate) fn sizes(folder: Option<&Path>) -> Sizes {
    Sizes {
        memory: 16 * MIB,
        disk: folder.map(|folder| Disk {
            folder: folder.to_owned(),
            bytes: 128 * MIB,
        }),
        max_value: 2 * MIB,
        ttl: None,
    }
}

pub(crate) fn bounds() -> Bounds {
    Bounds {
        max_value: 2 * MIB,
        in_flight: 8 * MIB,
        least_rate: MIB as u64,
        connections: 16,
        allow: Vec::new(),
    }
}

pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) cache: Cache,
    metrics: Metrics,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    pub(crate) async fn start(sizes: &Sizes, bounds: Bounds) -> Self {
        let cache = Cache::open(sizes, None).await.unwrap();
        let metrics = Metrics::default();
        let server = Server::bind("127.0.0.1:0", cache.clone(), bounds, metrics.clone())
            .await
            .unwrap();
        let stop = CancellationToken::new();
        Self {
            address: server.local(),
            cache,
            metrics,
            task: tokio::spawn(server.run(stop.clone(), Duration::from_secs(10))),
            stop,
        }
    }

    pub(crate) async fn connect(&self) -> Client {
        Client(TcpStream::connect(self.address).await.unwrap())
    }

    /// Connects from another loopback address, which counts as another host.
    pub(crate) async fn connect_from(&self, address: [u8; 4]) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from((address, 0))).unwrap();
        Client(socket.connect(self.address).await.unwrap())
    }

    /// Returns the value of a metric's line, such as `pd_store_requests_total{operation="get",outcome="hit"}`.
    pub(crate) fn metric(&self, line: &str) -> Option<f64> {
        let text = text(&self.metrics.registry(self.cache.clone()));
        let value = text
            .lines()
            .find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
        value.map(|value| value.parse().unwrap())
    }

    /// Waits until a metric has a value.
    pub(crate) async fn wait(&self, line: &str, value: f64) {
        until(line, || self.metric(line) == Some(value)).await;
    }

    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }

    /// Stops the port, and returns the cache when the port has ended.
    pub(crate) async fn port_ended(self) -> Cache {
        self.stop.cancel();
        self.task.await.unwrap();
        self.cache
    }

    pub(crate) async fn end(self) {
        self.port_ended().await.close(Duration::ZERO).await;
    }
}

/// Waits until something is true. Fails after a minute.
pub(crate) async fn until(what: &str, is_true: impl Fn() -> bool) {
    let wait = async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    assert!(waited.is_ok(), "it does not happen: {what}");
}

pub(crate) struct Client(pub(crate) TcpStream);

#[derive(Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) code: i32,
    /// `length, format, dtype, shape0..shape3, location`.
    pub(crate) numbers: [i32; 8],
    pub(crate) body: Vec<u8>,
}

pub(crate) const ABOUT: [i32; 7] = [5, 3, 1, 2, 32, 256, 0];

impl Client {
    /// Sends a head. `about` is `format, dtype, location, shape0..shape3`.
    pub(crate) async fn head(&mut self, command: i32, length: i32, about: [i32; 7], key: &str) {
        let mut head = Vec::new();
        for number in [command, length].into_iter().chain(about) {
            head.extend(number.to_le_bytes());
        }
        head.extend(format!("{key:150}").into_bytes());
        self.0.write_all(&head).await.unwrap();
    }

    pub(crate) async fn put(&mut self, key: &str, body: &[u8]) {
        let length = i32::try_from(body.len()).unwrap();
        self.head(PUT, length, ABOUT, key).await;
        self.0.write_all(body).await.unwrap();
    }

    pub(crate) async fn ask(&mut self, command: i32, key: &str) -> Answer {
        self.head(command, 0, [1, 2, 0, 0, 0, 0, 0], key).await;
        self.answer().await
    }

    pub(crate) async fn answer(&mut self) -> Answer {
        let read = async {
            let mut head = [0; RESPONSE_BYTES];
            self.0.read_exact(&mut head).await.unwrap();
            let mut all = head
                .chunks_exact(4)
                .map(|four| i32::from_le_bytes(four.try_into().unwrap()));
            let code = all.next().unwrap();
            let numbers: Vec<_> = all.collect();
            let mut body = vec![0; usize::try_from(numbers[0]).unwrap()];
            self.0.read_exact(&mut body).await.unwrap();
            Answer {
                code,
                numbers: numbers.try_into().unwrap(),
                body,
            }
        };
        tokio::time::timeout(Duration::from_secs(60), read)
            .await
            .expect("an answer in time")
    }

    /// Returns true if the server ends the connection in time.
    pub(crate) async fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_secs(60), self.0.read(&mut byte)).await;
        matches!(read, Ok(Ok(0) | Err(_)))
    }
}

/// Returns bytes that differ for each seed.
pub(crate) fn body(seed: u8, length: usize) -> Vec<u8> {
    let pattern: Vec<u8> = (0..=u8::MAX)
        .map(|i| i.wrapping_mul(31).wrapping_add(seed))
        .collect();
    let mut body = pattern.repeat(length / pattern.len() + 1);
    body.truncate(length);
    body
}
