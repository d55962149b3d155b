use std::io::{Read, Write as _};
use std::net::TcpStream;
use std::time::Instant;

use protocol::sender::Piece;

use super::frame::{Answer, Hello, Part, VERSION, Write};
use super::*;
use crate::transport::{HandshakeFields, Outcome};

mod fence;
mod hostile;
pub(super) mod keyed;
mod on_path;
mod pushes;

pub(super) const MIB: u64 = 1 << 20;
pub(super) const LEASE: LeaseId = LeaseId(77);

/// Makes a transport over a fresh buffer of `slots` slots, listening on loopback.
pub(super) fn tcp(name: &str, slots: u32, slot_bytes: u64, config: Config) -> Tcp {
    let buffer = Buffer::memfd(name, u64::from(slots) * slot_bytes).unwrap();
    let listen = Some("127.0.0.1:0".parse().unwrap());
    let tcp = Tcp::bind(Config { listen, ..config }, buffer).unwrap();
    tcp.divide(slots, slot_bytes);
    tcp
}

pub(super) fn remote(of: &Tcp) -> Remote {
    let layout = of.receiving.gates.current();
    Remote {
        name: "receiver".to_owned(),
        id: None,
        fields: HandshakeFields::default(),
        memory: protocol::dlist::Memory::Dram,
        slots: layout.slots(),
        slot_bytes: layout.slot_bytes(),
        address: Some(of.advert().address),
    }
}

pub(super) fn piece(from: u32, to: u32, bytes: u64) -> Piece {
    Piece {
        from: SlotIndex(from),
        to: SlotIndex(to),
        offset: 0,
        bytes,
    }
}

fn open_all(tcp: &Tcp, lease: LeaseId) {
    let slots = tcp.receiving.gates.current().slots();
    (0..slots).for_each(|slot| tcp.open(lease, None, SlotIndex(slot)));
}

fn sum(tcp: &Tcp, slot: u32, bytes: u64) -> u64 {
    let at = u64::from(slot) * tcp.receiving.gates.current().slot_bytes();
    tcp.receiving.buffer.sum(at, bytes).unwrap()
}

fn refused(tcp: &Tcp, why: Refusal) -> u64 {
    tcp.counts().refused[why.index()].1
}

/// Waits until another thread has made the condition true, and fails if it never does.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::yield_now();
    }
}

/// A peer that sends any bytes that a test wants.
#[derive(Debug)]
struct Raw(TcpStream);

impl Raw {
    fn connect(to: &Tcp) -> Self {
        let socket = TcpStream::connect(to.address().unwrap()).unwrap();
        let limit = Some(Duration::from_secs(60));
        socket.set_read_timeout(limit).unwrap();
        Self(socket)
    }

    /// Connects and waits for the welcome.
    fn welcome(to: &Tcp) -> Self {
        let mut raw = Self::connect(to);
        raw.say(&hello(to).encode());
        assert_eq!(raw.hear(), Some(Answer::Welcome));
        raw
    }

    fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn write(&mut self, batch: u64, lease: LeaseId, parts: &[Part]) {
        let head = Write {
            parts: u32::try_from(parts.len()).unwrap(),
            batch,
            lease,
        };
        self.say(&head.encode(parts));
    }

    /// Returns the next answer; `None` at the end of the stream.
    fn hear(&mut self) -> Option<Answer> {
        let mut bytes = [0; Answer::BYTES];
        match self.0.read_exact(&mut bytes) {
            Ok(()) => Some(Answer::decode(&bytes).unwrap()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("the connection stayed open: {error}"),
        }
    }
}

fn hello(to: &Tcp) -> Hello {
    let layout = to.receiving.gates.current();
    Hello {
        version: VERSION,
        slots: layout.slots(),
        slot_bytes: layout.slot_bytes(),
    }
}

fn part(slot: u32, offset: u64, bytes: u64) -> Part {
    Part {
        slot,
        offset,
        bytes,
    }
}
