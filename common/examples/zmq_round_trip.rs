//! Baseline for benchmarks: measures a round trip between the REQ socket of one process and the
//! ROUTER socket of another process on this host. Neither process does any other work.
//!
//! ```text
//! cargo run --release -p pd-common --example zmq_round_trip -- ROUNDS REQUEST_BYTES REPLY_BYTES PAUSE_US
//! ```
//! The program prints one line of JSON: the time of each round in microseconds, in the order of the rounds.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use common::zmq::{FromPeer, MAX_INIT_BYTES, Protection, Requester, RouterServer};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve", bytes] => serve(bytes.parse()?).await,
        [rounds, request, reply, pause] => {
            let pause = Duration::from_micros(pause.parse()?);
            measure(rounds.parse()?, request.parse()?, reply, pause).await
        }
        _ => anyhow::bail!("ROUNDS REQUEST_BYTES REPLY_BYTES PAUSE_US"),
    }
}

/// Answers every request with the given number of bytes, until the parent process ends this
/// process.
async fn serve(bytes: usize) -> anyhow::Result<()> {
    let mut server = RouterServer::bind("127.0.0.1", 0, MAX_INIT_BYTES, &Protection::Plain).await?;
    println!("{}", server.port());
    loop {
        if let FromPeer::Message(route, _) = server.recv().await? {
            server.send(route, vec![1_u8; bytes])?;
        }
    }
}

async fn measure(
    rounds: usize,
    request: usize,
    reply: &str,
    pause: Duration,
) -> anyhow::Result<()> {
    let mut server = Command::new(env::current_exe()?)
        .args(["serve", reply])
        .stdout(Stdio::piped())
        .spawn()?;
    let times = against(&mut server, rounds, request, pause).await;
    server.kill()?;
    server.wait()?;
    println!("{}", serde_json::to_string(&times?)?);
    Ok(())
}

async fn against(
    server: &mut std::process::Child,
    rounds: usize,
    request: usize,
    pause: Duration,
) -> anyhow::Result<Vec<f64>> {
    let mut port = String::new();
    BufReader::new(server.stdout.take().context("no output")?).read_line(&mut port)?;
    let mut client =
        Requester::connect("127.0.0.1", port.trim().parse()?, &Protection::Plain).await?;
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds + WARM_UP {
        std::thread::sleep(pause);
        let began = Instant::now();
        client.request(vec![2_u8; request]).await?;
        if round >= WARM_UP {
            times.push(began.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(times)
}

/// Number of rounds at the start that are not counted, because they include the connection and the first
/// allocations.
const WARM_UP: usize = 20;
