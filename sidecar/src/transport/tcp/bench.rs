//! Measures the transport's rate between two processes over loopback. Run it optimised:
//! `cargo test --release -p pd-sidecar tcp::bench -- --ignored --nocapture`
//! The cost of protection alone: `cargo test --release -p pd-sidecar tcp::bench::protection -- --ignored --nocapture`

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use common::identity::Auth;

use super::tests::keyed::Members;
use super::tests::{MIB, piece, remote, tcp};
use super::*;
use crate::transport::Outcome;

const LEASE: LeaseId = LeaseId(0xbe7c);
/// An environment variable that only the receiving process has: `slots,slot_bytes,protection,folder of keys`.
const CHILD: &str = "PD_TCP_BENCH_RECEIVER";

/// Runs in the receiving process: prints its address and waits until its input ends.
#[test]
#[ignore = "the other half of a measurement"]
fn receiver() {
    let Ok(shape) = std::env::var(CHILD) else {
        return;
    };
    let shape: Vec<&str> = shape.split(',').collect();
    let (slots, slot_bytes) = (shape[0].parse().unwrap(), shape[1].parse().unwrap());
    let config = keyed(shape[2], shape[3], "r");
    let receiver = tcp("bench-land", slots, slot_bytes, config);
    let owner: Option<Arc<str>> = receiver.config.identity.as_ref().map(|_| "a".into());
    (0..slots).for_each(|slot| receiver.open(LEASE, owner.as_ref(), SlotIndex(slot)));
    println!("\nlistening {}", receiver.address().unwrap());
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

/// Returns the configuration of a member of the test's roster; without keys for plain data.
fn keyed(protection: &str, folder: &str, name: &str) -> Config {
    let all = Protection::ALL.into_iter();
    let protection = all.clone().find(|one| one.as_str() == protection).unwrap();
    let folder = std::path::Path::new(folder);
    let (key, roster) = (folder.join(name), folder.join("roster"));
    let load = || Identity::load(Auth::Require, &key, &roster).unwrap();
    Config {
        identity: (protection != Protection::Plain).then(load),
        protection,
        ..Config::default()
    }
}

/// A sender and its link to a receiver in another process, which ends with this value.
struct Pair {
    child: Child,
    link: Arc<dyn Link>,
    slots: u32,
    chunk: u64,
    _sender: Tcp,
}

impl Pair {
    async fn new(
        total: u64,
        chunk: u64,
        streams: usize,
        members: &Members,
        protection: Protection,
    ) -> Self {
        let slots = u32::try_from(total / chunk).unwrap();
        let folder = members.folder.path().to_str().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "transport::tcp::bench::receiver"])
            .args(["--ignored", "--nocapture"])
            .env(
                CHILD,
                format!("{slots},{chunk},{},{folder}", protection.as_str()),
            )
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
            ..keyed(protection.as_str(), folder, "a")
        };
        let sender = tcp("bench-send", slots, chunk, config);
        sender.receiving.buffer.fill_random(0, total, 9).unwrap();
        let mut there = remote(&sender);
        there.address = Some(address);
        let link = sender.link(there).await.unwrap();
        assert!(link.reported().ends_with(protection.as_str()));
        Self {
            child,
            link,
            slots,
            chunk,
            _sender: sender,
        }
    }

    /// Returns the seconds of one write of all slots.
    async fn seconds(&self) -> f64 {
        let pieces = (0..self.slots).map(|i| piece(i, i, self.chunk)).collect();
        let start = Instant::now();
        assert_eq!(self.link.write(LEASE, pieces).await, Outcome::Done);
        start.elapsed().as_secs_f64()
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

async fn measure(total: u64, chunk: u64, streams: usize) {
    let members = Members::new();
    let pair = Pair::new(total, chunk, streams, &members, Protection::Plain).await;
    let rounds = if total > 16 * MIB { 12 } else { 200 };
    let mut seconds = Vec::new();
    for _ in 0..rounds {
        seconds.push(pair.seconds().await);
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

/// Compares the three protections. The three pairs write in turn, and each ratio is the median over the turns, so that other
/// work on the machine changes the ratios little.
#[tokio::test]
#[ignore = "a measurement"]
async fn protection() {
    let members = Members::new();
    for (total, chunk) in [(64, 1), (128, 16)] {
        let mut pairs = Vec::new();
        for protection in Protection::ALL {
            pairs.push(Pair::new(total * MIB, chunk * MIB, 2, &members, protection).await);
        }
        let mut turns = Vec::new();
        for _ in 0..60 {
            let mut turn = Vec::new();
            for pair in &pairs {
                turn.push(pair.seconds().await);
            }
            turns.push(turn);
        }
        for (i, protection) in Protection::ALL.into_iter().enumerate() {
            let median = |of: &dyn Fn(&Vec<f64>) -> f64| {
                let mut all: Vec<f64> = turns.iter().map(of).collect();
                all.sort_by(f64::total_cmp);
                all[all.len() / 2]
            };
            println!(
                "protection {} of {total} MiB in {chunk} MiB: {:.2} GB/s, {:.2} of plain",
                protection.as_str(),
                (total * MIB) as f64 / median(&|turn| turn[i]) / 1e9,
                median(&|turn| turn[0] / turn[i]),
            );
        }
    }
}
