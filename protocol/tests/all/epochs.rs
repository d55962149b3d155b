//! Tests of senders with the same name: a successor, another sidecar with the name, and late
//! messages of an earlier start.

use crate::setup::{CHUNK, keys, question};
use protocol::local::Await;
use protocol::message::{AllocX, ToReceiver};
use protocol::receiver::{Action, Config, Event, Receiver, Route};
use protocol::{EngineId, Epoch, RequestId, Time};

const OURS: Epoch = Epoch(100);

fn receiver() -> Receiver {
    Receiver::new(Config {
        epoch: OURS,
        max_quarantined: 2,
        ..crate::setup::receiver(8)
    })
}

/// Sends an alloc request of the sender `p` for a parked request of two chunks.
fn ask(d: &mut Receiver, req: &str, epoch: u64) {
    let tokens = 2 * CHUNK;
    let parked = Await {
        req: RequestId::from(req),
        keys: keys(req, 2),
        tokens,
        have_tokens: 0,
        deadline_ms: 60_000,
        written: false,
        ..Await::example()
    };
    let x = AllocX {
        seq: 1,
        id: "p".into(),
        epoch: Epoch(epoch),
        to_epoch: OURS,
        tokens,
        lease_ms: 3000,
        wait_ms: 1000,
        park_ms: 50,
        transport: "nixl".into(),
        ..AllocX::example()
    };
    let asked = question(req, 2, Some(x));
    d.handle(Time(1), Event::Await(EngineId(1), parked));
    let (route, message) = (Route(epoch), ToReceiver::AllocRequest(asked));
    d.handle(Time(1), Event::Peer { route, message });
}

/// Epochs are random. So the receiver cannot see which process sent an alloc request: a successor,
/// a second sidecar with the same name, or an earlier start whose message is late. In an earlier
/// version, the alloc request ended all other leases under the name.
#[test]
fn a_question_ends_no_lease_of_another_epoch() {
    let mut d = receiver();
    for (req, epoch) in [("a", 1), ("b", 2), ("c", 1)] {
        ask(&mut d, req, epoch);
    }
    let gauges = d.gauges();
    assert_eq!((gauges.held, gauges.quarantined), (6, 0));
    while let Some(action) = d.poll_action() {
        assert!(!matches!(action, Action::Ended(..)), "{action:?}");
    }
    // A lost connection ends only the lease of this connection.
    d.handle(Time(1), Event::PeerLost { route: Route(2) });
    let gauges = d.gauges();
    assert_eq!((gauges.held, gauges.quarantined), (4, 2));
}
