//! Ports for tests in which a program listens only after a while, or again after a restart.

#![allow(unreachable_pub, reason = "the programs of the tests have no users")]

use std::fs::File;
use std::net::TcpListener;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::sync::Mutex;

/// The ports that this process may still give away, and the lock that keeps other processes away from them.
static LEFT: Mutex<Option<(Range<u16>, File)>> = Mutex::new(None);

/// Returns a port of this host at which no process listens, and which no other test gets.
///
/// The port is below 32768: Linux gives only higher ports to sockets that name none. Each process locks a block of ports
/// by the same files as the tests in Python (`tests/harness/ports.py`). The system removes the lock when the process
/// ends.
pub fn free_port() -> u16 {
    let mut left = LEFT.lock().unwrap();
    loop {
        let (ports, _lock) = left.get_or_insert_with(lock_block);
        match ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()) {
            Some(port) => return port,
            None => *left = Some(lock_block()),
        }
    }
}

/// Returns a block of ports that no other process has locked.
fn lock_block() -> (Range<u16>, File) {
    let user = std::fs::metadata("/proc/self").unwrap().uid();
    let folder = std::env::temp_dir().join(format!("pd-test-ports-{user}"));
    std::fs::create_dir_all(&folder).unwrap();
    let blocks = (FIRST..LAST).step_by(usize::from(BLOCK));
    let mut free = blocks.filter_map(|first| {
        let mut options = File::options();
        let file = options.append(true).create(true);
        let file = file.open(folder.join(first.to_string())).unwrap();
        file.try_lock()
            .is_ok()
            .then_some((first..first + BLOCK, file))
    });
    free.next()
        .expect("a block of ports that no other test run has")
}

/// The same numbers as in `tests/harness/ports.py`.
const FIRST: u16 = 20_000;
const LAST: u16 = 30_000;
const BLOCK: u16 = 250;
