//! Sends PUT and GET requests of the `lm://` protocol as fast as the server takes them:
//! `store_load HOST:PORT CLIENTS VALUES BYTES`. Each client puts VALUES values and then gets each of them twice. Prints one
//! JSON object with bytes per second and the times of the GETs.

use std::time::{Duration, Instant};

use store::lm::RESPONSE_BYTES;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const PUT: i32 = 1;
const GET: i32 = 2;
const EXIST: i32 = 3;

#[tokio::main]
async fn main() {
    let mut args = std::env::args().skip(1);
    let address = args.next().expect("HOST:PORT");
    let mut number = || -> usize {
        let text = args.next().expect("CLIENTS VALUES BYTES");
        text.parse().expect("a number")
    };
    let (clients, values, bytes) = (number(), number(), number());
    let mut open = Vec::new();
    for client in 0..clients {
        let stream = TcpStream::connect(&address).await.expect("a connection");
        stream.set_nodelay(true).expect("an option");
        open.push((client, stream));
    }
    let began = Instant::now();
    let mut puts = JoinSet::new();
    for (client, mut stream) in open {
        puts.spawn(async move {
            let body = vec![7; bytes];
            for value in 0..values {
                head(&mut stream, PUT, bytes, client, value).await;
                stream.write_all(&body).await.expect("a server that reads");
            }
            // A PUT has no answer. The answer to this request comes when all values have arrived.
            head(&mut stream, EXIST, 0, client, values - 1).await;
            assert_eq!(answer(&mut stream).await, (200, 0));
            (client, stream)
        });
    }
    let open = puts.join_all().await;
    let put = began.elapsed();
    let began = Instant::now();
    let mut gets = JoinSet::new();
    for (client, mut stream) in open {
        gets.spawn(async move {
            let mut times = Vec::new();
            let mut body = vec![0; bytes];
            for value in (0..values).chain(0..values) {
                let began = Instant::now();
                head(&mut stream, GET, 0, client, value).await;
                assert_eq!(answer(&mut stream).await, (200, bytes));
                stream.read_exact(&mut body).await.expect("a whole value");
                times.push(began.elapsed());
            }
            times
        });
    }
    let mut times: Vec<Duration> = gets.join_all().await.into_iter().flatten().collect();
    let get = began.elapsed();
    times.sort_unstable();
    let total = (clients * values * bytes) as f64;
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64();
    println!(
        r#"{{"put_bytes_per_s": {}, "get_bytes_per_s": {}, "get_p50_s": {}, "get_p99_s": {}, "bytes": {}}}"#,
        total / put.as_secs_f64(),
        2.0 * total / get.as_secs_f64(),
        at(50),
        at(99),
        3.0 * total
    );
}

/// Sends a request's head: the memory format KV_2LTD, the type bfloat16, and a shape.
async fn head(stream: &mut TcpStream, command: i32, bytes: usize, client: usize, value: usize) {
    let length = i32::try_from(bytes).expect("a value below 2 GiB");
    let mut head = Vec::new();
    for number in [command, length, 1, 3, 0, 2, 2, 256, 32] {
        head.extend(number.to_le_bytes());
    }
    let key = format!("org/model@1@0@{client:08x}{value:08x}@bfloat16");
    head.extend(format!("{key:150}").into_bytes());
    stream.write_all(&head).await.expect("a server that reads");
}

/// Reads a response's head, and returns its code and length.
async fn answer(stream: &mut TcpStream) -> (i32, usize) {
    let mut head = [0; RESPONSE_BYTES];
    stream.read_exact(&mut head).await.expect("an answer");
    let number =
        |at: usize| i32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    (number(0), usize::try_from(number(4)).expect("a length"))
}
