//! Tests of lists of prompts: the prefill engine computes the prompts one after the other, and the decode
//! engine waits for all of them from the beginning.

use crate::setup::{CHUNK, SECOND, keys, question};
use protocol::local::Await;
use protocol::message::{AllocX, ToReceiver};
use protocol::receiver::{Action, Event, Receiver, Route};
use protocol::{EngineId, Epoch, Reason, RequestId, Time};

const PROMPTS: [&str; 4] = ["r", "r/1", "r/2", "r/3"];

fn park(d: &mut Receiver, now: Time, req: &str) {
    let parked = Await {
        req: RequestId::from(req),
        keys: keys(req, 1),
        tokens: CHUNK,
        have_tokens: 0,
        deadline_ms: 60_000,
        written: false,
        ..Await::example()
    };
    d.handle(now, Event::Await(EngineId(1), parked));
}

fn ask(d: &mut Receiver, now: Time, req: &str) {
    let x = AllocX {
        seq: 1,
        id: "p".into(),
        epoch: Epoch(1),
        to_epoch: Epoch(2),
        tokens: CHUNK,
        lease_ms: 60_000,
        wait_ms: 1000,
        park_ms: 50,
        transport: "nixl".into(),
        ..AllocX::example()
    };
    let (route, message) = (
        Route(1),
        ToReceiver::AllocRequest(question(req, 1, Some(x))),
    );
    d.handle(now, Event::Peer { route, message });
}

/// Returns the requests whose wait ended, each with the reason.
fn ended(d: &mut Receiver, now: Time) -> Vec<(String, Option<Reason>)> {
    d.handle(now, Event::Deadline);
    let mut all = Vec::new();
    while let Some(action) = d.poll_action() {
        if let Action::Ended(_, ended) = action {
            all.push((ended.req.0, ended.reason));
        }
    }
    all
}

#[test]
fn while_one_prompt_of_a_list_comes_the_others_wait() {
    let mut d = Receiver::new(crate::setup::receiver(8));
    let mut now = Time(1);
    // The other requests have neighbouring ids, but no prompt of this list.
    let others = ["q", "r-1", "r0", "r1/1"];
    for req in PROMPTS.into_iter().chain(others) {
        park(&mut d, now, req);
    }
    // Each prompt takes four seconds. A request without a sender waits for five seconds.
    let mut gone = Vec::new();
    for (at, req) in PROMPTS.into_iter().take(3).enumerate() {
        ask(&mut d, now, req);
        now = now + 4 * SECOND;
        let ended = ended(&mut d, now);
        assert!(at > 0 || ended.is_empty(), "{ended:?}");
        gone.extend(ended);
    }
    let expect = others.map(|req| (req.to_owned(), Some(Reason::NoSender)));
    assert_eq!(gone, expect);
    // No sender asks for slots for the last prompt.
    now = now + SECOND;
    let last = ("r/3".to_owned(), Some(Reason::NoSender));
    assert_eq!(ended(&mut d, now), [last]);
}
