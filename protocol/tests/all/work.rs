//! Checks that the work per message is proportional to the size of the message and to the number of
//! granted slots.

use crate::setup::{CHUNK, question};
use protocol::message::{AllocX, ToReceiver, ToSender, Written};
use protocol::receiver::{Action, Config, Event, Receiver, Route, Unchecked};
use protocol::{Epoch, LeaseId, SlotIndex, Time};

const OURS: Epoch = Epoch(100);
const ROUTE: Route = Route(1);

/// Returns a receiver that has granted slots for this many chunks, and the lease and its slots.
fn leased(chunks: u32) -> (Receiver, LeaseId, Vec<u32>) {
    let mut d = Receiver::new(Config {
        epoch: OURS,
        ..crate::setup::receiver(2 * chunks)
    });
    let x = AllocX {
        seq: 1,
        id: "p".into(),
        epoch: Epoch(1),
        to_epoch: OURS,
        tokens: chunks * CHUNK,
        lease_ms: 3000,
        wait_ms: 1000,
        park_ms: 0,
        transport: "tcp".into(),
        ..AllocX::example()
    };
    let asked = question("r", chunks, Some(x));
    let message = ToReceiver::AllocRequest(asked);
    let route = ROUTE;
    d.handle(Time(1), Event::Peer { route, message });
    let mut granted = None;
    while let Some(action) = d.poll_action() {
        if let Action::Send {
            message: ToSender::AllocResponse(response),
            ..
        } = action
        {
            let slots = response.remote_indexes.iter();
            let slots = slots.map(|&i| u32::try_from(i).expect("a slot")).collect();
            granted = response.x.and_then(|x| x.lease).map(|lease| (lease, slots));
        }
    }
    let (lease, slots) = granted.expect("a lease");
    (d, lease, slots)
}

#[test]
fn a_slot_is_summed_once_a_grant_however_often_a_message_names_it() {
    let (mut d, lease, slots) = leased(2);
    let mut written = Written {
        lease,
        epoch: OURS,
        chunks: Vec::new(),
        indexes: Vec::new(),
        sums: Vec::new(),
        ..Written::example()
    };
    for n in 0..500u32 {
        // The message names chunks with their own slots, with the slot of another chunk, and with a
        // slot that was not granted.
        for (chunk, slot) in [(0, slots[0]), (1, slots[1]), (0, slots[1]), (1, 3)] {
            written.chunks.push(chunk);
            written.indexes.push(slot);
            written.sums.push(u64::from(n));
        }
    }
    let sum = |chunk: u32| Unchecked {
        chunk,
        slot: SlotIndex(slots[chunk as usize]),
        bytes: u64::from(CHUNK)
            * crate::setup::layout()
                .token_bytes()
                .expect("a plain layout"),
        sum: 0,
    };
    let asked = d.unchecked(Route(1), &written);
    assert_eq!(asked, [sum(0), sum(1)], "{} sums of 2 slots", asked.len());
    let elsewhere = Written {
        epoch: Epoch(99),
        ..written.clone()
    };
    assert_eq!(d.unchecked(Route(1), &elsewhere), []);
    let message = ToReceiver::Written(written.clone());
    let route = ROUTE;
    d.handle(Time(2), Event::Peer { route, message });
    assert_eq!(
        d.unchecked(Route(1), &written),
        [],
        "they are written by now"
    );
}

/// After one wrong checksum the other chunks are not wanted, so the receiver computes no further
/// checksums.
#[test]
fn a_lease_that_nobody_wants_is_not_summed() {
    let (mut d, lease, slots) = leased(2);
    d.handle(Time(2), Event::Corrupt(lease));
    let written = Written {
        lease,
        epoch: OURS,
        chunks: vec![0, 1],
        indexes: slots,
        sums: vec![0, 0],
        ..Written::example()
    };
    assert_eq!(d.unchecked(Route(1), &written), []);
}
