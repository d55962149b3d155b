//! Measures the transport's rate between two processes over loopback. Run it optimised:
//! `cargo test --release -p pd-sidecar tcp::bench -- --ignored --nocapture`

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::Instant;

use super::tests::{MIB, piece, remote, tcp};
use super::*;
use crate::transport::Outcome;

const LEASE: LeaseId = LeaseId(0xbe7c);
/// An environment variable that only the receiving process has: `slots,slot_bytes`.
const CHILD: &str = "PD_TCP_BENCH_RECEIVER";

/// Runs in the receiving process: prints its address and waits until its input ends.
#[test]
#[ignore = "the other half of a measurement"]
fn receiver() {
    let Ok(shape) = std::env::var(CHILD) else {
        return;
    };
    let (slots, slot_bytes) = shape.split_once(',').unwrap();
    let (slots, slot_bytes) = (slots.parse().unwrap(), slot_bytes.parse().unwrap());
    let receiver = tcp("bench-land", slots, slot_bytes, Config::default());
    (0..slots).for_each(|slot| receiver.open(LEASE, SlotIndex(slot)));
    println!("\nlistening {}", receiver.address().unwrap());
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

async fn measure(total: u64, chunk: u64, streams: usize) {
    let slots = u32::try_from(total / chunk).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "transport::tcp::bench::receiver"])
        .args(["--ignored", "--nocapture"])
        .env(CHILD, format!("{slots},{chunk}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = lines
        .map(Result::unwrap)
        .find_map(|line| Some(line.strip_prefix("listening ")?.to_owned()))
        .unwrap();
    let config = Config {
        streams,
        ..Config::default()
    };
    let sender = tcp("bench-send", slots, chunk, config);
    sender.receiving.buffer.fill_random(0, total, 9).unwrap();
    let mut there = remote(&sender);
    there.address = Some(address);
    let link = sender.link(there).await.unwrap();
    let rounds = if total > 16 * MIB { 12 } else { 200 };
    let mut seconds = Vec::new();
    for _ in 0..rounds {
        let pieces = (0..slots).map(|i| piece(i, i, chunk)).collect();
        let start = Instant::now();
        assert_eq!(link.write(LEASE, pieces).await, Outcome::Done);
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let median = seconds[rounds / 2];
    println!(
        "{:6} KiB in {:5} KiB, {streams} streams: median {:.2} GB/s = {:.0} us, best {:.0}, worst {:.0} us",
        total >> 10,
        chunk >> 10,
        total as f64 / median / 1e9,
        median * 1e6,
        seconds[0] * 1e6,
        seconds[rounds - 1] * 1e6,
    );
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[tokio::test]
#[ignore = "a measurement"]
async fn throughput() {
    for streams in [1, 2] {
        for (total, chunk) in [(64, 64), (1024, 1024), (4096, 1024)] {
            measure(total << 10, chunk << 10, streams).await;
        }
        for (total, chunk) in [(64, 1), (64, 16), (512, 1), (512, 16)] {
            measure(total * MIB, chunk * MIB, streams).await;
        }
    }
}
