//! Measures the transport's rate between two processes. Raw prepared NIXL writes alternate with the
//! transport's writes, so that a busy machine slows both. Run it optimised:
//! `cargo test --release -p pd-sidecar nixl::bench -- --ignored --nocapture`

use std::rc::Rc;
use std::time::Instant;

use ::nixl::{Agent, Memory, Merge, Pinned, Row as RawRow, State, Transfer};

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
    let mut raw = raw(library, &buffer, &receiver, total, chunk);
    let mut ours = Vec::new();
    // Both kinds of writes alternate, so that a change of the machine's speed affects both kinds.
    for round in 0..18 {
        for (_, transfer, seconds) in &mut raw {
            let start = Instant::now();
            let mut state = transfer.post().unwrap();
            while state == State::Running {
                state = transfer.poll();
            }
            assert_eq!(state, State::Done);
            seconds.push(start.elapsed().as_secs_f64());
        }
        let pieces = (0..slots).map(|i| piece(i, i, chunk)).collect();
        let start = Instant::now();
        assert_eq!(link.write(LEASE, pieces).await, Outcome::Done);
        ours.push(start.elapsed().as_secs_f64());
        // The first rounds still open connections and register memory, so they do not count.
        if round == 2 {
            ours.clear();
            raw.iter_mut().for_each(|(_, _, seconds)| seconds.clear());
        }
    }
    assert_eq!(
        receiver.sum(slots - 1, chunk),
        buffer.sum(total - chunk, chunk).unwrap()
    );
    let ours = median(ours);
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let rate = |seconds: f64| total as f64 / seconds / 1e9;
    let raw: Vec<(String, f64)> = raw
        .into_iter()
        .map(|(name, _, seconds)| (name, median(seconds)))
        .collect();
    let best = raw.iter().map(|(_, s)| *s).fold(f64::MAX, f64::min);
    let list: Vec<String> = raw
        .iter()
        .map(|(name, seconds)| format!("{name} {:.2}", rate(*seconds)))
        .collect();
    println!(
        "{:4} MiB in {:2} MiB, {}: {:.2} GB/s, {:.0} us; of the best raw {:.3}; raw: {}",
        total / MIB,
        chunk / MIB,
        link.reported(),
        rate(ours),
        ours * 1e6,
        best / ours,
        list.join(", "),
    );
}

/// Makes raw requests, which are only posted and polled, with several sizes of descriptors.
fn raw(
    library: &'static Library,
    buffer: &Arc<Buffer>,
    receiver: &Receiver,
    total: u64,
    chunk: u64,
) -> Vec<(String, Transfer, Vec<f64>)> {
    let agent = Agent::new(library, &::nixl::Config::ucx("raw")).unwrap();
    let pinned = Arc::clone(buffer) as Arc<dyn Pinned>;
    let registration = Rc::new(agent.register(pinned, Memory::Dram, 0).unwrap());
    let remote = agent.load(&receiver.remote.fields.metadata).unwrap();
    let there = receiver.remote.fields.rows[0];
    let divisions = [
        (chunk, Merge::Neighbours),
        (256 << 10, Merge::Nothing),
        (512 << 10, Merge::Nothing),
        (1 << 20, Merge::Nothing),
        (chunk, Merge::Nothing),
    ];
    let request = |(bytes, merge): (u64, Merge)| {
        let ranges: Vec<(u64, u64)> = (0..total / bytes).map(|i| (i * bytes, bytes)).collect();
        let rows: Vec<RawRow> = ranges
            .iter()
            .map(|&(offset, bytes)| RawRow {
                address: there.address + offset,
                bytes,
                device: there.device,
            })
            .collect();
        let local = Rc::new(registration.prepare(&ranges).unwrap());
        let remote = Rc::new(remote.prepare(Memory::Dram, &rows).unwrap());
        let indices: Vec<i32> = (0..i32::try_from(ranges.len()).unwrap()).collect();
        let transfer = Transfer::write(&local, &indices, &remote, &indices, merge).unwrap();
        (format!("{}K {merge:?}", bytes >> 10), transfer, Vec::new())
    };
    divisions.into_iter().map(request).collect()
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
