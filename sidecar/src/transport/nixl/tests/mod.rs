//! Tests the transport with the real library: this process sends, and child processes receive.

use std::io::Write as _;
use std::process::Command;
use std::time::Instant;

use protocol::sender::Piece;

use super::*;
use crate::transport::Outcome;

mod process;

pub(super) use process::Receiver;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const LEASE: LeaseId = LeaseId(7);
pub(super) const DEVICE: u64 = 3;

/// Loads the library, or returns `None` after a message that the test is skipped.
pub(super) fn library() -> Option<&'static Library> {
    match Library::load(&Search::from_env()) {
        Ok(library) => Some(library),
        Err(error) if std::env::var_os("PD_REQUIRE_NIXL").is_some_and(|v| v == "1") => {
            panic!("{error}")
        }
        Err(error) => {
            // `eprintln!` would not help, because the test harness hides its output if the test passes.
            let text = format!("SKIP (set PD_REQUIRE_NIXL=1 to fail instead): {error}\n");
            std::io::stderr().write_all(text.as_bytes()).unwrap();
            None
        }
    }
}

pub(super) fn start(library: &'static Library, slots: u32, slot_bytes: u64) -> (Nixl, Arc<Buffer>) {
    start_with(library, slots, slot_bytes, |_| {})
}

fn start_with(
    library: &'static Library,
    slots: u32,
    slot_bytes: u64,
    change: impl FnOnce(&mut Config),
) -> (Nixl, Arc<Buffer>) {
    let mut config = Config::new(uuid::Uuid::new_v4().to_string(), DEVICE);
    change(&mut config);
    let buffer = Buffer::memfd("nixl-test", u64::from(slots) * slot_bytes).unwrap();
    let nixl = Nixl::start(library, config, Arc::clone(&buffer)).unwrap();
    nixl.divide(slots, slot_bytes);
    (nixl, buffer)
}

pub(super) fn piece(from: u32, to: u32, bytes: u64) -> Piece {
    Piece {
        from: SlotIndex(from),
        to: SlotIndex(to),
        offset: 0,
        bytes,
    }
}

#[tokio::test]
async fn chunks_arrive_and_nothing_else_does() {
    let Some(library) = library() else { return };
    let (slots, slot_bytes) = (6, 3 * MIB + 512);
    let mut receiver = Receiver::start(slots, slot_bytes);
    let (sender, buffer) = start(library, slots, slot_bytes);
    buffer
        .fill_random(0, u64::from(slots) * slot_bytes, 1)
        .unwrap();
    let blank = receiver.sum(0, slot_bytes);
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    assert_eq!(link.kind(), KIND);
    let reported = link.reported();
    assert!(
        reported.starts_with("UCX_TLS=") && reported.contains("estimate of UCX"),
        "{reported}"
    );

    let partial = 1_000_000;
    let pieces = vec![
        piece(0, 5, slot_bytes),
        piece(1, 1, slot_bytes),
        piece(4, 2, partial),
    ];
    assert_eq!(link.write(LEASE, pieces).await, Outcome::Done);
    for (from, to, bytes) in [(0_u32, 5, slot_bytes), (1, 1, slot_bytes), (4, 2, partial)] {
        let sent = buffer.sum(u64::from(from) * slot_bytes, bytes).unwrap();
        assert_eq!(receiver.sum(to, bytes), sent, "slot {to}");
    }
    for slot in [0, 3, 4] {
        assert_eq!(receiver.sum(slot, slot_bytes), blank, "slot {slot}");
    }
    let counts = sender.shared.counters.read();
    assert_eq!((counts.done, counts.peers, counts.stuck), (1, 1, 0));
    // Slot 2 has only the descriptors that the partial chunk touches.
    assert_ne!(
        receiver.sum(2, slot_bytes),
        buffer.sum(4 * slot_bytes, slot_bytes).unwrap()
    );
}

#[tokio::test]
async fn many_writes_at_once_all_arrive() {
    let Some(library) = library() else { return };
    let (slots, slot_bytes) = (64, MIB);
    let mut receiver = Receiver::start(slots, slot_bytes);
    let (sender, buffer) = start(library, slots, slot_bytes);
    buffer
        .fill_random(0, u64::from(slots) * slot_bytes, 2)
        .unwrap();
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    let writes = (0..slots).map(|slot| link.write(LEASE, vec![piece(slot, slots - 1 - slot, MIB)]));
    for outcome in futures::future::join_all(writes).await {
        assert_eq!(outcome, Outcome::Done);
    }
    for slot in 0..slots {
        let sent = buffer.sum(u64::from(slot) * MIB, MIB).unwrap();
        assert_eq!(receiver.sum(slots - 1 - slot, MIB), sent);
    }
}

#[tokio::test]
async fn a_write_waits_until_its_bytes_are_there() {
    let Some(library) = library() else { return };
    let mut receiver = Receiver::start(2, MIB);
    let stall = Duration::from_secs(3);
    let (sender, _buffer) = start_with(library, 2, MIB, |config| config.stall = stall);
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    crate::transport::readiness::tests::check(&*link, LEASE, piece(0, 1, MIB), stall).await;
}

#[tokio::test]
async fn a_dead_receiver_fails_its_writes_and_its_successor_is_reached() {
    let Some(library) = library() else { return };
    let (slots, slot_bytes) = (4, MIB);
    let (sender, buffer) = start(library, slots, slot_bytes);
    buffer
        .fill_random(0, u64::from(slots) * slot_bytes, 3)
        .unwrap();
    let mut first = Receiver::start(slots, slot_bytes);
    first.expect(true);
    let link = sender.link(first.remote.clone()).await.unwrap();
    let all = || {
        (0..slots)
            .map(|slot| piece(slot, slot, MIB))
            .collect::<Vec<_>>()
    };
    assert_eq!(link.write(LEASE, all()).await, Outcome::Done);
    first.kill();
    let start = Instant::now();
    let Outcome::Failed { terminal, error } = link.write(LEASE, all()).await else {
        panic!("a write to a dead process was done");
    };
    assert!(start.elapsed() < Duration::from_secs(60), "{error}");
    println!("terminal {terminal} after {:?}: {error}", start.elapsed());
    // Nothing is posted on a link that has failed.
    let again = link.write(LEASE, all()).await;
    assert!(
        matches!(&again, Outcome::Failed { terminal: true, error } if error.contains("has failed")),
        "{again:?}"
    );
    let mut second = Receiver::start(slots, slot_bytes);
    second.expect(true);
    let link = sender.link(second.remote.clone()).await.unwrap();
    assert!(Transport::is_running(&sender));
    assert_eq!(link.write(LEASE, all()).await, Outcome::Done);
    assert_eq!(second.sum(3, MIB), buffer.sum(3 * MIB, MIB).unwrap());
}

#[tokio::test]
async fn what_cannot_be_linked_or_written_is_refused_with_its_reason() {
    let Some(library) = library() else { return };
    let receiver = Receiver::start(2, MIB);
    let (sender, _buffer) = start(library, 2, MIB);
    let refused = async |change: &dyn Fn(&mut Remote), why: &str| {
        let mut remote = receiver.remote.clone();
        change(&mut remote);
        let cause = sender.link(remote).await.unwrap_err().cause;
        assert!(cause.contains(why), "{cause:?} does not say {why:?}");
    };
    refused(&|remote| remote.fields.metadata.clear(), "no nixl").await;
    refused(
        &|remote| remote.fields.metadata.truncate(90),
        "backend failed",
    )
    .await;
    refused(&|remote| remote.slots = 3, "3 slots").await;
    refused(&|remote| remote.fields.rows[1].bytes = 512, "512 bytes").await;
    refused(&|remote| remote.fields.rows[1].device = 9, "not registered").await;
    refused(
        &|remote| remote.fields.rows[1].address = u64::MAX - 5,
        "not registered",
    )
    .await;

    let link = sender.link(receiver.remote.clone()).await.unwrap();
    let unsent = async |pieces, why: &str| match link.write(LEASE, pieces).await {
        Outcome::Failed {
            terminal: true,
            error,
        } => assert!(error.contains(why), "{error:?} does not say {why:?}"),
        other => panic!("{other:?}"),
    };
    unsent(vec![piece(2, 0, 1)], "not within").await;
    unsent(vec![piece(0, 2, 1)], "not within").await;
    unsent(vec![piece(0, 0, MIB + 1)], "not within").await;
    assert_eq!(link.write(LEASE, Vec::new()).await, Outcome::Done);
    sender.divide(4, MIB / 2);
    unsent(vec![piece(0, 0, 1)], "another slot layout").await;
}

#[tokio::test]
async fn before_the_first_cut_there_are_no_rows_and_no_links() {
    let Some(library) = library() else { return };
    let receiver = Receiver::start(2, MIB);
    let buffer = Buffer::memfd("nixl-test", MIB).unwrap();
    let nixl = Nixl::start(library, Config::new("uncut", 0), buffer).unwrap();
    assert_eq!(nixl.rows(), []);
    assert_eq!(
        protocol::metadata::agent_name(&nixl.handshake_fields().unwrap().metadata),
        Some(&b"uncut"[..])
    );
    let cause = nixl.link(receiver.remote.clone()).await.unwrap_err().cause;
    assert!(cause.contains("no engine"), "{cause}");
}

#[tokio::test]
async fn a_receiver_killed_in_the_middle_fails_the_write() {
    let Some(library) = library() else { return };
    let (slots, slot_bytes) = (16, 16 * MIB);
    let (sender, _buffer) = start(library, slots, slot_bytes);
    let all = || {
        (0..slots)
            .map(|slot| piece(slot, slot, slot_bytes))
            .collect::<Vec<_>>()
    };
    for attempt in 1.. {
        let mut receiver = Receiver::start(slots, slot_bytes);
        receiver.expect(true);
        let link = sender.link(receiver.remote.clone()).await.unwrap();
        // This write makes the connection, so that the next write moves bytes at once.
        let first = link.write(LEASE, vec![piece(0, 0, 1)]).await;
        assert_eq!(first, Outcome::Done);
        let write = tokio::spawn(link.write(LEASE, all()));
        tokio::time::sleep(Duration::from_millis(5)).await;
        receiver.kill();
        let killed = Instant::now();
        match write.await.unwrap() {
            Outcome::Failed { error, .. } => {
                assert!(killed.elapsed() < Duration::from_secs(60), "{error}");
                break;
            }
            Outcome::Done => assert!(attempt < 10, "every write was faster than the kill"),
        }
    }
    let mut receiver = Receiver::start(slots, slot_bytes);
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    assert_eq!(link.write(LEASE, all()).await, Outcome::Done);
}

#[tokio::test]
async fn a_write_that_stands_still_is_given_up_but_not_released() {
    let Some(library) = library() else { return };
    let stall = Duration::from_millis(500);
    let (sender, buffer) = start_with(library, 4, MIB, |config| config.stall = stall);
    buffer.fill_random(0, 4 * MIB, 4).unwrap();
    let mut receiver = Receiver::start(4, MIB);
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    // The receiver is stopped, so the first write waits until the receiver does its part to make the
    // connection.
    receiver.signal("STOP");
    let start = Instant::now();
    let (first, second) = tokio::join!(
        link.write(LEASE, vec![piece(0, 0, MIB)]),
        link.write(LEASE, vec![piece(1, 1, MIB)]),
    );
    for outcome in [first, second] {
        assert!(
            matches!(&outcome, Outcome::Failed { terminal: false, error } if error.contains("no byte moved")),
            "{outcome:?}"
        );
    }
    assert!(start.elapsed() >= stall && start.elapsed() < 60 * stall);
    assert_eq!(sender.shared.counters.read().uncertain, 2);
    // The same peer cannot be linked again while the old writes may still reach its connection.
    let cause = sender
        .link(receiver.remote.clone())
        .await
        .unwrap_err()
        .cause;
    assert!(cause.contains("2 transfers"), "{cause}");
    receiver.signal("CONT");
    // The thread polls the old writes until they end, and then the peer is free.
    let link = loop {
        match sender.link(receiver.remote.clone()).await {
            Ok(link) => break link,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(90), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(
        link.write(LEASE, vec![piece(3, 2, MIB)]).await,
        Outcome::Done
    );
    for (from, to) in [(0, 0), (1, 1), (3, 2)] {
        let sent = buffer.sum(from * MIB, MIB).unwrap();
        assert_eq!(receiver.sum(to, MIB), sent, "slot {to}");
    }
}

#[tokio::test]
async fn a_dropped_write_goes_on_and_a_dropped_link_waits_for_it() {
    let Some(library) = library() else { return };
    let (sender, buffer) = start(library, 8, 8 * MIB);
    buffer.fill_random(0, 64 * MIB, 5).unwrap();
    let mut receiver = Receiver::start(8, 8 * MIB);
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    let pieces = (0..8).map(|slot| piece(slot, slot, 8 * MIB)).collect();
    let write = link.write(LEASE, pieces);
    drop(link);
    // One poll posts the write.
    assert!(futures::poll!(write).is_pending());
    let expect: Vec<u64> = (0..8)
        .map(|slot| buffer.sum(slot * 8 * MIB, 8 * MIB).unwrap())
        .collect();
    let start = Instant::now();
    while (0..8).any(|slot| receiver.sum(slot, 8 * MIB) != expect[slot as usize]) {
        assert!(start.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The sender connects to the receiver's agent again.
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 1, MIB)]).await,
        Outcome::Done
    );
    // While one link exists, another link to the same peer shares its connection.
    let other = sender.link(receiver.remote.clone()).await.unwrap();
    drop(link);
    assert_eq!(
        other.write(LEASE, vec![piece(0, 2, MIB)]).await,
        Outcome::Done
    );
    drop(sender);
    let Outcome::Failed { .. } = other.write(LEASE, vec![piece(0, 2, MIB)]).await else {
        panic!("written by a thread that has ended");
    };
}

#[tokio::test]
async fn an_idle_engine_thread_sleeps() {
    let Some(library) = library() else { return };
    // The test finds the thread by its name, which has the device number.
    let (sender, _buffer) = start_with(library, 4, MIB, |config| config.device = 77);
    let mut receiver = Receiver::start(4, MIB);
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
    let busy = cores_of("nixl-77", Duration::from_secs(3)).await;
    // The limits distinguish a sleeping thread from a spinning thread, even on a busy machine, where each wake
    // costs several times as much.
    assert!(busy < 0.05, "{busy} of a core, connected and idle");
    // If announced writes do not come, the thread uses more CPU time, but less than a core.
    sender.expect(true);
    let busy = cores_of("nixl-77", Duration::from_secs(2)).await;
    assert!(busy < 0.5, "{busy} of a core, waiting for announced writes");
    sender.expect(false);
    let busy = cores_of("nixl-77", Duration::from_secs(2)).await;
    assert!(busy < 0.05, "{busy} of a core, idle again");
}

/// Returns the share of a core that a thread of this process uses over some time.
async fn cores_of(thread: &str, time: Duration) -> f64 {
    let task = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| {
            let name = std::fs::read_to_string(task.join("comm"));
            name.is_ok_and(|name| name.trim() == thread)
        })
        .expect("no such thread");
    let nanos = || -> u64 {
        let stat = std::fs::read_to_string(task.join("schedstat")).unwrap();
        stat.split(' ').next().unwrap().parse().unwrap()
    };
    let (before, start) = (nanos(), Instant::now());
    tokio::time::sleep(time).await;
    Duration::from_nanos(nanos() - before).as_secs_f64() / start.elapsed().as_secs_f64()
}

/// Runs these tests once more in another process, because UCX reads its environment once per process.
#[test]
fn all_of_this_over_tcp() {
    if library().is_none() {
        return;
    }
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["transport::nixl::tests::", "--skip", "over_tcp"])
        .env("UCX_TLS", "tcp")
        .status()
        .unwrap();
    assert!(status.success());
}
