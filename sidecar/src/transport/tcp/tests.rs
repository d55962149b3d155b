use super::*;
use crate::transport::Outcome;
use protocol::sender::Piece;

pub(super) const MIB: u64 = 1 << 20;

/// A transport over a fresh buffer of `slots` slots, listening on loopback.
pub(super) fn tcp(name: &str, slots: u32, slot_bytes: u64, config: Config) -> Tcp {
    let buffer = Buffer::memfd(name, u64::from(slots) * slot_bytes).unwrap();
    let listen = Some("127.0.0.1:0".parse().unwrap());
    let tcp = Tcp::bind(Config { listen, ..config }, buffer).unwrap();
    tcp.cut(slots, slot_bytes);
    tcp
}

pub(super) fn remote(of: &Tcp) -> Remote {
    let cut = of.shore.gates.current();
    Remote {
        name: "receiver".to_owned(),
        metadata: Vec::new(),
        rows: Vec::new(),
        memory: protocol::dlist::Memory::Dram,
        slots: cut.slots(),
        slot_bytes: cut.slot_bytes(),
        tcp: Some(of.advert().address),
    }
}

pub(super) fn piece(from: u32, to: u32, bytes: u64) -> Piece {
    Piece {
        from: SlotIndex(from),
        to: SlotIndex(to),
        bytes,
    }
}

#[tokio::test]
async fn bytes_arrive_where_they_should() {
    for streams in [1, 3] {
        let config = Config {
            streams,
            ..Config::default()
        };
        let sender = tcp("send", 8, 3 * MIB, config.clone());
        let receiver = tcp("land", 8, 3 * MIB, config);
        sender.shore.buffer.fill_random(0, 24 * MIB, 1).unwrap();
        let link = sender.link(remote(&receiver)).await.unwrap();
        let lease = LeaseId(77);
        let pieces: Vec<Piece> = (0..8).map(|i| piece(i, 7 - i, 3 * MIB - 5)).collect();
        (0..8).for_each(|slot| receiver.open(lease, SlotIndex(slot)));
        assert_eq!(link.write(lease, pieces).await, Outcome::Done);
        for slot in 0..8_u64 {
            let sum = |tcp: &Tcp, slot: u64| {
                let buffer = &tcp.shore.buffer;
                buffer.sum(slot * 3 * MIB, 3 * MIB - 5).unwrap()
            };
            assert_eq!(sum(&sender, slot), sum(&receiver, 7 - slot));
        }
        assert_eq!(receiver.counts().bytes, 8 * (3 * MIB - 5));
    }
}
