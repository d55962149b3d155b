//! Sends requests to a router, in a closed loop or at a fixed rate, and measures their times.
//!
//!     load ADDRESS CONNECTIONS SECONDS [rate=N] [stream] [legs] [prompt=BYTES]
//!
//! Without a rate, each connection sends its next request as soon as it has the answer to the last
//! request. With a rate, requests are due at fixed times, and the time of a late request counts
//! from its due time. With `legs`, the program sends both legs of a request directly to an engine;
//! the router's cost is the difference between this time and the time through the router. Prints
//! one JSON object.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep_until;

#[derive(Clone)]
struct Options {
    address: SocketAddr,
    connections: u32,
    end: Instant,
    rate: Option<f64>,
    requests: Vec<Vec<u8>>,
    stream: bool,
}

#[derive(Default)]
struct Seen {
    micros: Vec<u64>,
    errors: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [address, connections, seconds, more @ ..] = &words[..] else {
        panic!("usage: load ADDRESS CONNECTIONS SECONDS [rate=N] [stream] [legs] [prompt=BYTES]");
    };
    let value = |name: &str| more.iter().find_map(|word| word.strip_prefix(name));
    let has = |name: &str| more.iter().any(|word| word == name);
    let stream = has("stream");
    let prompt = "x".repeat(value("prompt=").map_or(64, |text| text.parse().expect("bytes")));
    let address: SocketAddr = address.parse().expect("an address");
    let post = |more: &str| post(address, &prompt, more);
    let answer = post(if stream { ",\"stream\":true" } else { "" });
    let prefill = post(",\"stream\":false,\"kv_transfer_params\":{\"do_remote_decode\":true}");
    let seconds: f64 = seconds.parse().expect("seconds");
    let started = Instant::now();
    let options = Options {
        address,
        connections: connections.parse().expect("a number of connections"),
        end: started + Duration::from_secs_f64(seconds),
        rate: value("rate=").map(|text| text.parse().expect("a rate")),
        requests: if has("legs") {
            vec![prefill, answer]
        } else {
            vec![answer]
        },
        stream,
    };
    let mut tasks = JoinSet::new();
    for number in 0..options.connections {
        tasks.spawn(connection(options.clone(), started, number));
    }
    let mut all = Seen::default();
    while let Some(one) = tasks.join_next().await {
        let one = one.expect("no panic");
        all.micros.extend(one.micros);
        all.errors += one.errors;
    }
    let took = started.elapsed().as_secs_f64();
    all.micros.sort_unstable();
    let at = |part: usize| {
        all.micros
            .get(all.micros.len() * part / 1000)
            .copied()
            .unwrap_or(0)
    };
    println!(
        "{{\"requests\": {}, \"errors\": {}, \"seconds\": {took:.3}, \"p50_us\": {}, \"p99_us\": {}}}",
        all.micros.len(),
        all.errors,
        at(500),
        at(990)
    );
}

async fn connection(options: Options, started: Instant, number: u32) -> Seen {
    let mut seen = Seen::default();
    let mut buffer = Vec::with_capacity(16 * 1024);
    let mut count = 0;
    let mut open: Option<TcpStream> = None;
    loop {
        let mut from = Instant::now();
        if let Some(rate) = options.rate {
            let turn = f64::from(count) * f64::from(options.connections) + f64::from(number);
            from = started + Duration::from_secs_f64(turn / rate);
            sleep_until(from.into()).await;
        }
        if from.max(Instant::now()) >= options.end {
            return seen;
        }
        count += 1;
        let mut stream = match open.take() {
            Some(stream) => stream,
            None => match TcpStream::connect(options.address).await {
                Ok(stream) => stream,
                Err(_) => {
                    seen.errors += 1;
                    continue;
                }
            },
        };
        drop(stream.set_nodelay(true));
        let mut ok = true;
        for (at, request) in options.requests.iter().enumerate() {
            let streams = options.stream && at + 1 == options.requests.len();
            ok = ok
                && exchange(&mut stream, request, &mut buffer, streams)
                    .await
                    .unwrap_or(false);
        }
        if ok {
            let took = from.elapsed().as_micros();
            seen.micros.push(u64::try_from(took).unwrap_or(u64::MAX));
            open = Some(stream);
        } else {
            seen.errors += 1;
        }
    }
}

/// Sends a request and reads its answer to the end. Returns true if the answer is complete and
/// successful.
async fn exchange(
    stream: &mut TcpStream,
    request: &[u8],
    buffer: &mut Vec<u8>,
    streams: bool,
) -> std::io::Result<bool> {
    stream.write_all(request).await?;
    buffer.clear();
    loop {
        if stream.read_buf(buffer).await? == 0 {
            return Ok(false);
        }
        let Some(head) = find(buffer, b"\r\n\r\n") else {
            continue;
        };
        let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
        let length = text
            .split("\r\n")
            .find_map(|line| line.strip_prefix("content-length:"));
        let is_over = match length.and_then(|length| length.trim().parse::<usize>().ok()) {
            Some(length) => buffer.len() >= head + 4 + length,
            None => buffer.ends_with(b"\r\n0\r\n\r\n"),
        };
        if is_over {
            let complete = !streams || find(buffer, b"data: [DONE]").is_some();
            return Ok(buffer.starts_with(b"HTTP/1.1 200") && complete);
        }
    }
}

fn post(address: SocketAddr, prompt: &str, more: &str) -> Vec<u8> {
    let body =
        format!(r#"{{"model":"m","prompt":"{prompt}","max_tokens":8,"temperature":0{more}}}"#);
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body.as_bytes()].concat()
}

fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len())
        .position(|window| window == needle)
}
