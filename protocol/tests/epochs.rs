//! Senders of one name: a successor, a namesake, and messages that come late.

use std::time::Duration;

use protocol::local::Await;
use protocol::message::{AllocRequest, AllocX, ToReceiver};
use protocol::receiver::{Action, Config, Event, Receiver, Route};
use protocol::{EngineId, Epoch, Layout, RequestId, Time, VERSION};

const CHUNK: u32 = 4;
const SECOND: Duration = Duration::from_secs(1);
const OURS: Epoch = Epoch(100);

fn receiver() -> Receiver {
    let layout = Layout {
        model: "m".into(),
        dtype: "float".into(),
        layers: 1,
        kv_heads: 1,
        head_size: 1,
        mla: false,
        chunk_tokens: CHUNK,
    };
    Receiver::new(Config {
        epoch: OURS,
        slots: 8,
        token_bytes: layout.token_bytes().unwrap(),
        chunk_tokens: CHUNK,
        max_requests: 16,
        max_quarantined: 2,
        no_sender: 5 * SECOND,
        unclaimed: 10 * SECOND,
        max_lease: 30 * SECOND,
        max_wait: 10 * SECOND,
        lmcache_wait: SECOND,
        layout: Some(layout),
        seed: 7,
    })
}

/// A question of the sender `p` for a request of two chunks that is parked.
fn ask(d: &mut Receiver, req: &str, epoch: u64) {
    let keys = vec![format!("{req}/0"), format!("{req}/1")];
    let tokens = 2 * CHUNK;
    let parked = Await {
        req: RequestId::from(req),
        keys: keys.clone(),
        tokens,
        have_tokens: 0,
        deadline_ms: 60_000,
        written: false,
    };
    let asked = AllocRequest {
        keys,
        fmt: 1,
        shape: vec![2, 1, 4, 1],
        dtype: "float".into(),
        last_chunk_toks: CHUNK,
        req_id: req.into(),
        is_last_batch: true,
        total_chunks: 2,
        x: Some(AllocX {
            v: VERSION,
            seq: 1,
            id: "p".into(),
            epoch: Epoch(epoch),
            to_epoch: OURS,
            tokens,
            lease_ms: 3000,
            wait_ms: 1000,
            park_ms: 50,
            transport: "nixl".into(),
        }),
    };
    d.handle(Time(1), Event::Await(EngineId(1), parked));
    let (route, message) = (Route(epoch), ToReceiver::AllocRequest(asked));
    d.handle(Time(1), Event::Peer { route, message });
}

/// Epochs are random: a question does not tell whether it is of a successor, of a second sidecar that was
/// given the same name, or a late one of the past. Once it ended whatever was under way under the name.
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
    // The silence of each ends its own.
    d.handle(Time(1), Event::PeerLost { route: Route(2) });
    let gauges = d.gauges();
    assert_eq!((gauges.held, gauges.quarantined), (4, 2));
}
