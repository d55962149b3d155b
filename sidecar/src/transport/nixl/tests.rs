//! The transport over the real library: this process sends, children of it receive.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Lines, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use protocol::sender::Piece;

use super::*;
use crate::transport::Outcome;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const LEASE: LeaseId = LeaseId(7);
const DEVICE: u64 = 3;

/// The library, or `None` after saying loudly that the test is skipped.
pub(super) fn library() -> Option<&'static Library> {
    match Library::load(&Search::from_env()) {
        Ok(library) => Some(library),
        Err(error) if std::env::var_os("PD_REQUIRE_NIXL").is_some_and(|v| v == "1") => {
            panic!("{error}")
        }
        Err(error) => {
            // Not by eprintln, which the test harness swallows when the test passes.
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
    nixl.cut(slots, slot_bytes);
    (nixl, buffer)
}

pub(super) fn piece(from: u32, to: u32, bytes: u64) -> Piece {
    Piece {
        from: SlotIndex(from),
        to: SlotIndex(to),
        bytes,
    }
}

/// A receiving process.
pub(super) struct Receiver {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    pub(super) remote: Remote,
}

impl Receiver {
    pub(super) fn start(slots: u32, slot_bytes: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "transport::nixl::tests::receiver"])
            .args(["--ignored", "--nocapture"])
            .env(CHILD, format!("{slots},{slot_bytes}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut receiver = Self {
            remote: Remote {
                name: format!("receiver-{}", child.id()),
                metadata: Vec::new(),
                rows: Vec::new(),
                memory: Memory::Dram,
                slots,
                slot_bytes,
                tcp: None,
            },
            child,
            input,
            output,
        };
        receiver.remote.metadata = unhex(&receiver.answer("metadata"));
        let address: u64 = receiver.answer("address").parse().unwrap();
        receiver.remote.rows = (0..u64::from(slots))
            .map(|slot| Row {
                address: address + slot * slot_bytes,
                bytes: slot_bytes,
                device: DEVICE,
            })
            .collect();
        receiver
    }

    /// Sends a line, gives what the child answers to it.
    fn ask(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        let word = line.split_whitespace().next().unwrap();
        self.answer(word)
    }

    fn answer(&mut self, word: &str) -> String {
        let prefix = format!("@{word} ");
        loop {
            let line = self.output.next().expect("the receiver has died").unwrap();
            if let Some((_, text)) = line.split_once(&prefix) {
                return text.to_owned();
            }
        }
    }

    pub(super) fn sum(&mut self, slot: u32, bytes: u64) -> u64 {
        self.ask(&format!("sum {slot} {bytes}")).parse().unwrap()
    }

    pub(super) fn expect(&mut self, writing: bool) {
        self.ask(&format!("expect {writing}"));
    }

    fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([format!("-{name}"), self.child.id().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // It may be dead already, which is what is wanted.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Set in the receiving process: `slots,slot_bytes`.
const CHILD: &str = "PD_NIXL_TEST_RECEIVER";

/// The receiving process: obeys lines until its input ends.
#[test]
#[ignore = "the other half of the tests"]
fn receiver() {
    let Ok(shape) = std::env::var(CHILD) else {
        return;
    };
    let (slots, slot_bytes) = shape.split_once(',').unwrap();
    let (slots, slot_bytes): (u32, u64) = (slots.parse().unwrap(), slot_bytes.parse().unwrap());
    let (nixl, buffer) = start(library().unwrap(), slots, slot_bytes);
    let rows = nixl.rows();
    assert_eq!(rows.len(), slots as usize);
    let say = |word: &str, text: String| {
        println!("@{word} {text}");
        std::io::stdout().flush().unwrap();
    };
    say("metadata", hex(&nixl.metadata()));
    say("address", rows[0].address.to_string());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["sum", slot, bytes] => {
                let offset = slot.parse::<u64>().unwrap() * slot_bytes;
                let sum = buffer.sum(offset, bytes.parse().unwrap()).unwrap();
                say("sum", sum.to_string());
            }
            ["expect", writing] => {
                nixl.expect(writing.parse().unwrap());
                say("expect", String::new());
            }
            _ => panic!("{line}"),
        }
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
    assert_eq!(link.kind(), Kind::Nixl);
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
    let counts = sender.counts();
    assert_eq!((counts.done, counts.peers, counts.stuck), (1, 1, 0));
    // Of slot 2 no more than the descriptors that the partial chunk touches.
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
    assert!(start.elapsed() < Duration::from_secs(11), "{error}");
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
    assert!(sender.is_running());
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
    refused(&|remote| remote.metadata.clear(), "no nixl").await;
    refused(&|remote| remote.metadata.truncate(90), "backend failed").await;
    refused(&|remote| remote.slots = 3, "3 slots").await;
    refused(&|remote| remote.rows[1].bytes = 512, "512 bytes").await;
    refused(&|remote| remote.rows[1].device = 9, "not registered").await;
    refused(
        &|remote| remote.rows[1].address = u64::MAX - 5,
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
    sender.cut(4, MIB / 2);
    unsent(vec![piece(0, 0, 1)], "cut anew").await;
}

#[tokio::test]
async fn before_the_first_cut_there_are_no_rows_and_no_links() {
    let Some(library) = library() else { return };
    let receiver = Receiver::start(2, MIB);
    let buffer = Buffer::memfd("nixl-test", MIB).unwrap();
    let nixl = Nixl::start(library, Config::new("uncut", 0), buffer).unwrap();
    assert_eq!(nixl.rows(), []);
    assert_eq!(agent_name_of(&nixl.metadata()), Some(&b"uncut"[..]));
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
        // Connects, so that the next one moves bytes from its beginning.
        let first = link.write(LEASE, vec![piece(0, 0, 1)]).await;
        assert_eq!(first, Outcome::Done);
        let write = tokio::spawn(link.write(LEASE, all()));
        tokio::time::sleep(Duration::from_millis(5)).await;
        receiver.kill();
        let killed = Instant::now();
        match write.await.unwrap() {
            Outcome::Failed { error, .. } => {
                assert!(killed.elapsed() < Duration::from_secs(11), "{error}");
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
    // The first write waits for the receiver's part of connecting.
    receiver.signal("STOP");
    let start = Instant::now();
    let (first, second) = tokio::join!(
        link.write(LEASE, vec![piece(0, 0, MIB)]),
        link.write(LEASE, vec![piece(1, 1, MIB)]),
    );
    for outcome in [first, second] {
        assert!(
            matches!(&outcome, Outcome::Failed { terminal: false, error } if error.contains("nothing moved")),
            "{outcome:?}"
        );
    }
    assert!(start.elapsed() >= stall && start.elapsed() < 10 * stall);
    assert_eq!(sender.counts().uncertain, 2);
    // The same peer cannot be connected to anew while the old writes may still look into it.
    let cause = sender
        .link(receiver.remote.clone())
        .await
        .unwrap_err()
        .cause;
    assert!(cause.contains("2 transfers"), "{cause}");
    receiver.signal("CONT");
    // They end, because they are polled on, and free the peer.
    let link = loop {
        match sender.link(receiver.remote.clone()).await {
            Ok(link) => break link,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(20), "{error}"),
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
    // One poll posts it.
    assert!(futures::poll!(write).is_pending());
    let expect: Vec<u64> = (0..8)
        .map(|slot| buffer.sum(slot * 8 * MIB, 8 * MIB).unwrap())
        .collect();
    let start = Instant::now();
    while (0..8).any(|slot| receiver.sum(slot, 8 * MIB) != expect[slot as usize]) {
        assert!(start.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The connection is made anew, of the same agent.
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 1, MIB)]).await,
        Outcome::Done
    );
    // While a link lives, another to the same peer shares its connection.
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
    // The thread is found by its name.
    let (sender, _buffer) = start_with(library, 4, MIB, |config| config.device = 77);
    let mut receiver = Receiver::start(4, MIB);
    receiver.expect(true);
    let link = sender.link(receiver.remote.clone()).await.unwrap();
    assert_eq!(
        link.write(LEASE, vec![piece(0, 0, MIB)]).await,
        Outcome::Done
    );
    let busy = cores_of("nixl-77", Duration::from_secs(3)).await;
    assert!(busy < 0.01, "{busy} of a core, connected and idle");
    // Announced writes that do not come cost more, but no core.
    sender.expect(true);
    let busy = cores_of("nixl-77", Duration::from_secs(2)).await;
    assert!(busy < 0.1, "{busy} of a core, waiting for announced writes");
    sender.expect(false);
    let busy = cores_of("nixl-77", Duration::from_secs(2)).await;
    assert!(busy < 0.01, "{busy} of a core, idle again");
}

/// What a thread of this process takes of a core, over some time.
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

/// UCX reads its environment once a process, so these tests run once more in another one.
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2)
        .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
        .collect()
}
