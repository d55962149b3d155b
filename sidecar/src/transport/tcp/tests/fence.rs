//! Tests that `close` is a fence, even under load.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures::executor::block_on;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

#[test]
fn closing_within_a_write_discards_the_rest_and_nothing_else() {
    let receiver = tcp("land", 3, MIB, Config::default());
    open_all(&receiver, LEASE);
    let mut raw = Raw::welcome(&receiver);
    raw.write(1, LEASE, &[part(0, 0, MIB), part(1, 0, MIB)]);
    raw.say(&vec![1; 600_000]);
    until_landed(&receiver, 200_000);
    receiver.close(SlotIndex(0));
    let frozen = [sum(&receiver, 0, MIB), sum(&receiver, 1, MIB)];
    // The slot is opened again, even to the same lease, but this write was admitted before and must not land.
    receiver.open(LEASE, None, SlotIndex(0));
    raw.say(&vec![2; 2 * MEBI - 600_000]);
    let why = Refusal::Closed;
    assert_eq!(raw.hear(), Some(Answer::Refused { batch: 1, why }));
    assert_eq!([sum(&receiver, 0, MIB), sum(&receiver, 1, MIB)], frozen);
    raw.write(2, LEASE, &[part(0, 5, 1), part(2, 0, MIB)]);
    raw.say(&vec![3; MEBI + 1]);
    assert_eq!(raw.hear(), Some(Answer::Landed { batch: 2 }));
    assert_eq!((receiver.counts().batches, refused(&receiver, why)), (1, 1));
}

#[test]
fn a_new_cut_closes_every_slot() {
    let receiver = tcp("land", 2, MIB, Config::default());
    open_all(&receiver, LEASE);
    let mut raw = Raw::welcome(&receiver);
    raw.write(1, LEASE, &[part(1, 0, MIB)]);
    raw.say(&vec![1; 600_000]);
    until_landed(&receiver, MIB + 200_000);
    receiver.divide(4, MIB / 2);
    open_all(&receiver, LeaseId(2));
    let frozen = sum(&receiver, 0, 2 * MIB);
    raw.say(&vec![2; MEBI - 600_000]);
    let why = Refusal::Closed;
    assert_eq!(raw.hear(), Some(Answer::Refused { batch: 1, why }));
    assert_eq!(sum(&receiver, 0, 2 * MIB), frozen);
}

/// Waits until the byte at an offset is 1. The receiver copies parts of 512 KiB, so the test must have sent
/// more than that.
fn until_landed(receiver: &Tcp, offset: u64) {
    let mut byte = [0];
    until("it has begun to land", || {
        let buffer = &receiver.receiving.buffer;
        buffer.copy_out(offset, &mut byte).unwrap();
        byte == [1]
    });
}

/// [`MIB`] as a length.
const MEBI: usize = 1 << 20;
const SLOTS: u32 = 6;
const SLOT_BYTES: u64 = 3 * MIB / 2;
const CLOSES: u32 = 400;
/// Writes that must be done, and writes that must be refused.
const LEAST: u64 = 20;

/// Checks that a closed slot's bytes never change, and that a write which is reported as done is complete.
/// Writers write into all open slots as fast as they can, while one thread closes slots, checks them and opens
/// them under other leases.
#[test]
fn no_byte_lands_in_a_closed_slot() {
    let config = Config {
        streams: 2,
        ..Config::default()
    };
    let receiver = tcp("land", SLOTS, SLOT_BYTES, config.clone());
    let leases: Mutex<Vec<Option<LeaseId>>> = Mutex::new(vec![None; SLOTS as usize]);
    let (stop, done, refused) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let waits = std::thread::scope(|scope| {
        for seed in 0..3 {
            let there = remote(&receiver);
            let (leases, stop, done, refused) = (&leases, &stop, &done, &refused);
            let config = config.clone();
            scope.spawn(move || writer(seed, there, config, leases, stop, done, refused));
        }
        let above = |n: &AtomicU64| n.load(Ordering::Relaxed) > LEAST;
        let contested = || above(&done) && above(&refused);
        let waits = closer(&receiver, &leases, contested);
        stop.store(true, Ordering::SeqCst);
        waits
    });
    let (done, refused) = (done.into_inner(), refused.into_inner());
    assert!(
        done > LEAST && refused > LEAST,
        "{done} writes done, {refused} refused: no contest"
    );
    let median = waits[waits.len() / 2];
    println!(
        "{done} done, {refused} refused; a close took {median:?}, at most {:?}",
        waits[waits.len() - 1]
    );
    // A close does not wait for a peer, only for a copy of 512 KiB. A busy machine may stop the thread that copies.
    assert!(
        median < Duration::from_millis(200),
        "a close took {median:?}"
    );
}

/// Closes slots until it has done so [`CLOSES`] times and there was a contest, for a minute at most.
fn closer(
    receiver: &Tcp,
    leases: &Mutex<Vec<Option<LeaseId>>>,
    contested: impl Fn() -> bool,
) -> Vec<Duration> {
    let end = Instant::now() + Duration::from_secs(60);
    let mut random = SmallRng::seed_from_u64(99);
    let mut frozen: Vec<Option<u64>> = vec![None; SLOTS as usize];
    let mut waits = Vec::new();
    let mut next = 1;
    while waits.len() < CLOSES as usize || !(contested() || Instant::now() > end) {
        let slot = random.random_range(0..SLOTS);
        let index = slot as usize;
        if let Some(sum_then) = frozen[index].take() {
            assert_eq!(
                sum(receiver, slot, SLOT_BYTES),
                sum_then,
                "slot {slot} changed"
            );
            let lease = LeaseId(next);
            next += 1;
            receiver.open(lease, None, SlotIndex(slot));
            leases.lock().unwrap()[index] = Some(lease);
        } else {
            // The writers do not know about the close, so their writes race with it.
            let start = Instant::now();
            receiver.close(SlotIndex(slot));
            waits.push(start.elapsed());
            leases.lock().unwrap()[index] = None;
            frozen[index] = Some(sum(receiver, slot, SLOT_BYTES));
        }
    }
    waits.sort();
    waits
}

fn writer(
    seed: u64,
    there: Remote,
    config: Config,
    leases: &Mutex<Vec<Option<LeaseId>>>,
    stop: &AtomicBool,
    done: &AtomicU64,
    refused: &AtomicU64,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let sender = tcp("send", SLOTS, SLOT_BYTES, config);
    let all = u64::from(SLOTS) * SLOT_BYTES;
    sender.receiving.buffer.fill_random(0, all, seed).unwrap();
    let connect = || runtime.block_on(sender.link(there.clone())).unwrap();
    let mut random = SmallRng::seed_from_u64(seed);
    let mut link = connect();
    while !stop.load(Ordering::SeqCst) {
        // One to three writes are in flight at the same time. Each write has one or two pieces of one lease.
        let writes: Vec<_> = (0..random.random_range(1..4))
            .filter_map(|_| {
                let slot = random.random_range(0..SLOTS);
                let lease = leases.lock().unwrap()[slot as usize]?;
                let bytes = random.random_range(1..=SLOT_BYTES);
                let from = random.random_range(0..SLOTS);
                Some(link.write(lease, vec![piece(from, slot, bytes)]))
            })
            .collect();
        for outcome in block_on(futures::future::join_all(writes)) {
            match outcome {
                Outcome::Done => drop(done.fetch_add(1, Ordering::Relaxed)),
                Outcome::Failed { .. } => {
                    refused.fetch_add(1, Ordering::Relaxed);
                    // The receiver closes a connection if its first lease has just ended.
                    link = connect();
                }
            }
        }
    }
}
