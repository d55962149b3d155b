//! Tests the wire in this process, over one GPU. `sidecar selftest` tests two processes and two GPUs.

use std::io::Write as _;

use protocol::sender::Piece;

use super::*;
use crate::memory::Buffer;
use crate::memory::cuda::{Device, Which};
use crate::transport::{HandshakeFields, Outcome};

const LEASE: LeaseId = LeaseId(7);

fn transport(which: &Which, slots: u32, slot_bytes: u64) -> (CudaIpc, Arc<Buffer>) {
    let buffer = Buffer::on_gpu(which, u64::from(slots) * slot_bytes).unwrap();
    let config = Config {
        link: Duration::from_secs(5),
        stall: Duration::from_secs(3),
        drain: Duration::from_secs(2),
    };
    let transport = CudaIpc::start(Arc::clone(buffer.cuda().unwrap()), config).unwrap();
    transport.divide(slots, slot_bytes);
    (transport, buffer)
}

fn piece(from: u32, to: u32, bytes: u64) -> Piece {
    Piece {
        from: SlotIndex(from),
        to: SlotIndex(to),
        offset: 0,
        bytes,
    }
}

#[tokio::test]
async fn chunks_arrive_once_they_are_ready_and_nothing_else_does() {
    let which = Which::Ordinal(0);
    if let Err(error) = Device::open(&which) {
        let text = format!("SKIP (set PD_REQUIRE_CUDA=1 to fail instead): {error}\n");
        std::io::stderr().write_all(text.as_bytes()).unwrap();
        assert_ne!(std::env::var_os("PD_REQUIRE_CUDA"), Some("1".into()));
        return;
    }
    let (slots, slot_bytes) = (6, 3 << 20);
    let (sender, from) = transport(&which, slots, slot_bytes);
    let (receiver, to) = transport(&which, slots, slot_bytes);
    from.fill_random(0, 6 * slot_bytes, 1).unwrap();
    assert_eq!(sender.reaches(&receiver.advert(), true), Ok(()));
    assert!(sender.reaches(&receiver.advert(), false).is_err());
    let remote = Remote {
        name: "receiver".to_owned(),
        id: None,
        fields: HandshakeFields::default(),
        memory: protocol::dlist::Memory::Vram,
        slots,
        slot_bytes,
        address: Some(receiver.advert().address),
    };
    let mut other = remote.clone();
    other.slot_bytes += 1;
    assert!(sender.link(other).await.is_err());
    let link = sender.link(remote).await.unwrap();
    let pieces = vec![piece(0, 3, slot_bytes), piece(1, 4, 1000), piece(5, 0, 5)];
    assert_eq!(link.write(LEASE, pieces).await, Outcome::Done);
    let same = |a, b, len| {
        let sum = |buffer: &Buffer, slot| buffer.sum(slot * slot_bytes, len).unwrap();
        sum(&from, a) == sum(&to, b)
    };
    assert!(same(0, 3, slot_bytes) && same(1, 4, 1000) && same(5, 0, 5));
    assert!(!same(1, 4, 1001) && !same(5, 0, 6));

    let stall = Duration::from_secs(3);
    crate::transport::readiness::tests::check(&*link, LEASE, piece(2, 2, slot_bytes), stall).await;
    assert!(same(2, 2, slot_bytes));
    assert!(matches!(
        link.write(LEASE, vec![piece(0, 6, 1)]).await,
        Outcome::Failed { terminal: true, .. }
    ));
}
