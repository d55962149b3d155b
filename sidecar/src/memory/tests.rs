use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{SealFlags, fcntl_get_seals, ftruncate};

use super::*;

const MIB: u64 = 1 << 20;

fn flow(buffer: &Arc<Buffer>) -> (Outlet, Inlet) {
    let outlet = Outlet::new(Arc::clone(buffer)).unwrap();
    (outlet, Inlet::new(Arc::clone(buffer)).unwrap())
}

#[test]
fn a_buffer_is_sealed_and_has_all_its_pages() {
    let buffer = Buffer::memfd("sealed", 5 * MIB).unwrap();
    let Export::Memfd(fd) = buffer.export() else {
        panic!("host memory")
    };
    assert_eq!(buffer.export().as_str(), "memfd");
    let seals = fcntl_get_seals(fd).unwrap();
    assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    assert!(ftruncate(fd, MIB).is_err() && ftruncate(fd, 6 * MIB).is_err());
    let blocks = rustix::fs::fstat(fd).unwrap().st_blocks;
    assert!(blocks * 512 >= 5 << 20, "{blocks} blocks");
    assert!(buffer.address().is_multiple_of(rustix::param::page_size()));
    assert_eq!(buffer.bytes(), 5 * MIB);
}

#[test]
fn bytes_go_through_a_socket_into_another_range() {
    let buffer = Buffer::memfd("socket", 2 * MIB).unwrap();
    buffer.fill_random(0, 100_000, 7).unwrap();
    let (mut outlet, mut inlet) = flow(&buffer);
    let (a, b) = UnixStream::pair().unwrap();
    let (mut sent, mut got) = (0, 0);
    while got < 100_000 {
        if sent < 100_000 {
            sent += outlet
                .send(&a, sent, 4096.min(usize::try_from(100_000 - sent).unwrap()))
                .unwrap() as u64;
        }
        got += inlet.recv(&b, MIB + got, 1 << 16).unwrap() as u64;
    }
    assert_eq!(
        buffer.sum(0, 100_000).unwrap(),
        buffer.sum(MIB, 100_000).unwrap()
    );
    assert_eq!(
        inlet.recv(&b, MIB, 1).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    drop(a);
    assert_eq!(inlet.recv(&b, MIB, 1).unwrap(), 0);
}

#[test]
fn ranges_are_checked() {
    let buffer = Buffer::memfd("ranges", MIB).unwrap();
    let (mut outlet, mut inlet) = flow(&buffer);
    let (a, _b) = UnixStream::pair().unwrap();
    let kind = |result: io::Result<()>| result.map_err(|error| error.kind());
    for (offset, len) in [(0, MIB + 1), (MIB, 1), (u64::MAX, 2), (MIB + 1, 0)] {
        let wanted = Err(ErrorKind::InvalidInput);
        let count = usize::try_from(len).unwrap();
        assert_eq!(
            kind(outlet.send(a.as_fd(), offset, count).map(drop)),
            wanted
        );
        assert_eq!(kind(inlet.recv(a.as_fd(), offset, count).map(drop)), wanted);
        assert_eq!(kind(buffer.sum(offset, len).map(drop)), wanted);
        assert_eq!(kind(buffer.fill_random(offset, len, 1)), wanted);
        assert_eq!(kind(buffer.copy_out(offset, &mut vec![0; count])), wanted);
        assert_eq!(kind(buffer.copy_in(offset, &vec![0; count])), wanted);
    }
    assert_eq!(kind(buffer.copy_in(MIB, &[])), Ok(()));
}

#[test]
fn sums_are_plain_xxh3() {
    let buffer = Buffer::memfd("sums", 2 * MIB).unwrap();
    buffer.fill_random(3, 700_001, 42).unwrap();
    let mut copy = vec![0; 700_001];
    buffer.copy_out(3, &mut copy).unwrap();
    assert_eq!(
        buffer.sum(3, 700_001).unwrap(),
        xxhash_rust::xxh3::xxh3_64(&copy)
    );
    buffer.fill_random(3, 700_001, 43).unwrap();
    assert_ne!(
        buffer.sum(3, 700_001).unwrap(),
        xxhash_rust::xxh3::xxh3_64(&copy)
    );
}

#[test]
fn refusals_say_how_much_and_why() {
    assert!(matches!(
        Buffer::memfd("none", 0),
        Err(AllocError::Absurd { asked: 0 })
    ));
    assert!(matches!(
        Buffer::memfd("all", u64::MAX),
        Err(AllocError::Absurd { .. })
    ));
    let error = Buffer::memfd("much", 1 << 60).unwrap_err();
    assert!(matches!(error, AllocError::Short { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.starts_with("a buffer of 1048576.00 TiB was asked for, but "),
        "{text}"
    );
    assert!(text.contains("leaves "), "{text}");
}
