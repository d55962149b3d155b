//! What the transport moves between two processes. Run it optimised, and beside the raw baseline
//! (`cargo run --release -p nixl --example raw_write`):
//! `cargo test --release -p pd-sidecar nixl::bench -- --ignored --nocapture`

use std::time::Instant;

use super::tests::{LEASE, MIB, Receiver, library, piece, start};
use super::*;
use crate::transport::Outcome;

#[tokio::test]
#[ignore = "a measurement"]
async fn throughput() {
    let Some(library) = library() else { return };
    for (total, chunk) in [(64, 1), (64, 16), (512, 1), (512, 16), (1, 1)] {
        measure(library, total * MIB, chunk * MIB).await;
    }
}

async fn measure(library: &'static Library, total: u64, chunk: u64) {
    let slots = u32::try_from(total / chunk).unwrap();
    let mut receiver = Receiver::start(slots, chunk);
    let (sender, buffer) = start(library, slots, chunk);
    buffer.fill_random(0, total, 9).unwrap();
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    let mut seconds = Vec::new();
    for round in 0..15 {
        let pieces = (0..slots).map(|i| piece(i, i, chunk)).collect();
        let start = Instant::now();
        assert_eq!(link.write(LEASE, pieces).await, Outcome::Done);
        if round >= 3 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    assert_eq!(
        receiver.sum(slots - 1, chunk),
        buffer.sum(total - chunk, chunk).unwrap()
    );
    seconds.sort_by(f64::total_cmp);
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let rate = |s: f64| total as f64 / s / 1e9;
    println!(
        "{:4} MiB in {:2} MiB, {}: median {:.2}, best {:.2}, worst {:.2} GB/s; {:.0} us",
        total / MIB,
        chunk / MIB,
        link.reported(),
        rate(seconds[6]),
        rate(seconds[0]),
        rate(seconds[11]),
        seconds[6] * 1e6,
    );
}
