//! An engine that answers at once, so that the measured time of a request is the time of the
//! router.
//!
//!     scripted_engine ADDRESS [EVENTS [PACE_MS]]
//!
//! `/health` and `/v1/models` answer as vLLM's endpoints do. A prefill leg (`do_remote_decode`)
//! gets an answer with `kv_transfer_params` like NixlConnector's. Any other request gets a
//! completion. If the request contains `"stream":true`, the completion is a stream of EVENTS events
//! and `[DONE]`; with PACE_MS, the engine sends one event every PACE_MS milliseconds. The engine
//! parses only as much HTTP as its answers need, so that it takes little CPU time from the router
//! that is measured.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Whole responses, ready to be written.
struct Script {
    health: String,
    models: String,
    prefill: String,
    completion: String,
    stream: String,
    /// Time between two events; `None` if all events are written at once.
    pace: Option<Duration>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let address: SocketAddr = arguments
        .next()
        .and_then(|text| text.parse().ok())
        .expect("usage: scripted_engine ADDRESS [EVENTS]");
    let events = arguments
        .next()
        .map_or(8, |text| text.parse().expect("EVENTS is a number"));
    let pace = arguments
        .next()
        .map(|text| text.parse().expect("PACE_MS is a number"));
    let script = Arc::new(Script::new(events, pace.map(Duration::from_millis)));
    let listener = TcpListener::bind(address).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let script = Arc::clone(&script);
        // The task ends with its connection, and with the process.
        drop(tokio::spawn(async move {
            // A router may close its connection at any time, so errors are ignored.
            drop(serve(stream, &script).await);
        }));
    }
}

impl Script {
    fn new(events: usize, pace: Option<Duration>) -> Self {
        let choice =
            r#""choices":[{"index":0,"text":" token","logprobs":null,"finish_reason":null}]"#;
        let head = r#"{"id":"cmpl-1","object":"text_completion","created":1,"model":"m","#;
        let usage = r#""usage":{"prompt_tokens":16,"total_tokens":24,"completion_tokens":8}"#;
        let params = r#""kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2]],"remote_engine_id":"e","remote_request_id":"r","remote_host":"127.0.0.1","remote_port":5600,"tp_size":1}"#;
        let mut stream = String::from(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n",
        );
        for _ in 0..events {
            chunk(&mut stream, &format!("data: {head}{choice}}}\n\n"));
        }
        chunk(&mut stream, "data: [DONE]\n\n");
        stream.push_str("0\r\n\r\n");
        Self {
            health: whole(""),
            models: whole(r#"{"object":"list","data":[{"id":"m","object":"model"}]}"#),
            prefill: whole(&format!("{head}{choice},{usage},{params}}}")),
            completion: whole(&format!("{head}{choice},{usage}}}")),
            stream,
            pace,
        }
    }

    fn answer(&self, head: &[u8], body: &[u8]) -> &str {
        if head.starts_with(b"GET /v1/models") {
            &self.models
        } else if !head.starts_with(b"POST /v1/") {
            &self.health
        } else if holds(body, b"\"do_remote_decode\":true") {
            &self.prefill
        } else if holds(body, b"\"stream\":true") || holds(body, b"\"stream\": true") {
            &self.stream
        } else {
            &self.completion
        }
    }
}

async fn serve(mut stream: TcpStream, script: &Script) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(16 * 1024);
    loop {
        let head = loop {
            if let Some(at) = find(&buffer, b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let length = head + content_length(&buffer[..head]);
        while buffer.len() < length {
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        }
        let answer = script.answer(&buffer[..head], &buffer[head..length]);
        match script.pace {
            Some(pace) if std::ptr::eq(answer, script.stream.as_str()) => {
                for piece in answer.split_inclusive("\n\n\r\n") {
                    stream.write_all(piece.as_bytes()).await?;
                    tokio::time::sleep(pace).await;
                }
            }
            _ => stream.write_all(answer.as_bytes()).await?,
        }
        buffer.drain(..length);
    }
}

fn whole(body: &str) -> String {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn chunk(out: &mut String, data: &str) {
    // Writing into a string does not fail.
    let _ = write!(out, "{:x}\r\n{data}\r\n", data.len());
}

fn content_length(head: &[u8]) -> usize {
    let text = String::from_utf8_lossy(head).to_ascii_lowercase();
    let value = text
        .split("\r\n")
        .find_map(|line| line.strip_prefix("content-length:"));
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len())
        .position(|window| window == needle)
}

fn holds(hay: &[u8], needle: &[u8]) -> bool {
    find(hay, needle).is_some()
}
