//! Tests of this crate with the real library, between two processes.

#![allow(
    clippy::cast_possible_truncation,
    reason = "sizes of a test, on 64 bits"
)]

mod common;

use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};

use common::{DEVICE, Side, Target, library};
use nixl::{Error, Memory, Merge, RemoteList, Row, State, Transfer};
use rand::RngCore;

const MIB: u64 = 1 << 20;

/// Runs the child process of the other tests; see [`common::run_child`].
#[test]
fn child() {
    common::run_child();
}

#[test]
fn random_bytes_arrive() {
    check_bytes_arrive(None);
}

#[test]
fn random_bytes_arrive_over_tcp() {
    check_bytes_arrive(Some("tcp"));
}

/// Runs the test `writer` in a new process. UCX reads `UCX_TLS` once per process, so another value needs
/// another process.
fn check_bytes_arrive(tls: Option<&str>) {
    if library().is_none() {
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "writer", "--nocapture", "--ignored"]);
    match tls {
        Some(tls) => command.env("UCX_TLS", tls),
        None => command.env_remove("UCX_TLS"),
    };
    assert!(command.status().unwrap().success());
}

#[test]
#[ignore = "run by the tests above, with their environment"]
fn writer() {
    let library = library().unwrap();
    let bytes = 16 * MIB;
    let mut target = Target::start(bytes as usize, &[]);
    let side = Side::new(library, "writer", bytes as usize);
    let mut data = vec![0; bytes as usize];
    rand::rng().fill_bytes(&mut data);
    side.memory.write(0, &data);

    let remote = side.agent.load(&target.metadata).unwrap();
    let piece = MIB / 4;
    let ranges: Vec<(u64, u64)> = (0..64).map(|i| (i * piece, piece)).collect();
    let rows: Vec<Row> = ranges
        .iter()
        .map(|&(at, len)| target.row(at, len))
        .collect();
    let local = Rc::new(side.registration.prepare(&ranges).unwrap());
    let remote = Rc::new(remote.prepare(Memory::Dram, &rows).unwrap());
    assert_eq!((local.len(), remote.len()), (64, 64));

    // The write exchanges the two halves of the buffer, so that NIXL cannot merge the whole buffer
    // into one descriptor.
    let from: Vec<i32> = (0..64).collect();
    let to: Vec<i32> = (32..64).chain(0..32).collect();
    for merge in [Merge::Neighbours, Merge::Nothing] {
        let mut transfer = Transfer::write(&local, &from, &remote, &to, merge).unwrap();
        assert!(transfer.estimate().unwrap() > Duration::from_micros(10));
        let state = transfer.post().unwrap();
        assert_eq!(finish(&mut transfer, state), State::Done);
        let half = (8 * MIB) as usize;
        let arrived = target.read(0, bytes as usize);
        assert!(arrived[..half] == data[half..] && arrived[half..] == data[..half]);
        // The second round writes other bytes: with the same bytes it would prove nothing.
        data.rotate_left(1);
        side.memory.write(0, &data);
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_sent() {
    let Some(library) = library() else { return };
    let target = Target::start(MIB as usize, &[]);
    let side = Side::new(library, "refused", MIB as usize);
    let remote = side.agent.load(&target.metadata).unwrap();

    assert!(matches!(
        side.registration.prepare(&[(0, MIB + 1)]),
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        side.registration.prepare(&[(u64::MAX, 2)]),
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        side.registration.prepare(&[]),
        Err(Error::Invalid { .. })
    ));
    // One row is outside the peer's memory. The other row is inside the peer's memory, but has another
    // device id.
    for row in [
        target.row(0, 2 * MIB),
        Row {
            device: DEVICE + 1,
            ..target.row(0, 8)
        },
    ] {
        assert!(matches!(
            remote.prepare(Memory::Dram, &[row]),
            Err(Error::NotFound { .. })
        ));
    }
    let local = Rc::new(side.registration.prepare(&[(0, 8), (8, 16)]).unwrap());
    let rows = Rc::new(remote.prepare(Memory::Dram, &[target.row(0, 8)]).unwrap());
    let check = |from: &[i32], to: &[i32]| {
        let made = Transfer::write(&local, from, &rows, to, Merge::Neighbours);
        assert!(
            matches!(made, Err(Error::Invalid { .. })),
            "{from:?} {to:?}"
        );
    };
    check(&[], &[]);
    check(&[0], &[0, 0]);
    check(&[2], &[0]);
    check(&[-1], &[0]);
    check(&[1], &[0]);
    assert!(matches!(
        side.agent.load(b"nixlSerDes|"),
        Err(Error::Invalid { .. })
    ));
    // The blob has other metadata under the name of a loaded peer, as if another process used this
    // name.
    assert!(matches!(
        side.agent.load(&target.metadata[..100]),
        Err(Error::Taken { .. })
    ));
    assert!(matches!(
        side.agent.load(&side.agent.metadata().unwrap()),
        Err(Error::Taken { .. })
    ));
    drop(target);
    let target = Target::start(MIB as usize, &[]);
    assert!(matches!(
        side.agent.load(&target.metadata[..100]),
        Err(Error::Backend { .. })
    ));
    let remote = side.agent.load(&target.metadata).unwrap();
    let rows = Rc::new(remote.prepare(Memory::Dram, &[target.row(0, 8)]).unwrap());
    // The refused calls did not break the connection.
    assert!(!remote.is_broken());
    let mut transfer = Transfer::write(&local, &[0], &rows, &[0], Merge::Neighbours).unwrap();
    let state = transfer.post().unwrap();
    assert_eq!(finish(&mut transfer, state), State::Done);
}

#[test]
fn a_killed_peer_fails_the_write_and_its_successor_is_reached() {
    let Some(library) = library() else { return };
    let bytes = 64 * MIB;
    let side = Side::new(library, "survivor", bytes as usize);
    let local = Rc::new(side.registration.prepare(&[(0, bytes)]).unwrap());
    let list = |target: &Target| -> Rc<RemoteList> {
        let remote = side.agent.load(&target.metadata).unwrap();
        Rc::new(
            remote
                .prepare(Memory::Dram, &[target.row(0, bytes)])
                .unwrap(),
        )
    };
    let write = |rows: &Rc<RemoteList>| {
        let mut transfer = Transfer::write(&local, &[0], rows, &[0], Merge::Neighbours)?;
        let state = transfer.post()?;
        Ok::<_, Error>(finish(&mut transfer, state))
    };

    let mut target = Target::start(bytes as usize, &[]);
    let rows = list(&target);
    assert_eq!(write(&rows), Ok(State::Done));
    target.kill();
    match write(&rows) {
        Ok(State::Failed(_)) | Err(Error::Backend { .. }) => {}
        other => panic!("write to a dead peer gave {other:?}"),
    }
    assert!(matches!(write(&rows), Err(Error::Broken { .. })));

    let mut successor = Target::start(bytes as usize, &[]);
    side.memory.write(17, b"for the successor");
    let rows = list(&successor);
    assert_eq!(write(&rows), Ok(State::Done));
    assert_eq!(successor.read(17, 17), b"for the successor");
}

/// Polls until the transfer has ended; fails after 30 s.
fn finish(transfer: &mut Transfer, mut state: State) -> State {
    let start = Instant::now();
    while state == State::Running {
        assert!(start.elapsed() < Duration::from_secs(90), "{transfer:?}");
        state = transfer.poll();
    }
    state
}
