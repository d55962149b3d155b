//! Tests of reservations with a reused id, and of reservations without chunks.

use crate::setup::{CHUNK, keys};
use protocol::local::Reserve;
use protocol::sender::{self, Sender};
use protocol::{EngineId, Epoch, Reason, Time, VERSION};

const OURS: Epoch = Epoch(100);
const ENGINE: EngineId = EngineId(1);
const SLOTS: u32 = 8;

/// Handles an event. Returns the ends of requests that the sender reports to the engine and to the
/// proxy.
fn told(
    p: &mut Sender,
    now: Time,
    event: sender::Event,
) -> (Vec<Option<Reason>>, Vec<Option<Reason>>) {
    p.handle(now, event);
    let (mut engine, mut proxy) = (Vec::new(), Vec::new());
    while let Some(action) = p.poll_action() {
        match action {
            sender::Action::Ended(_, ended) => engine.push(ended.reason),
            sender::Action::Notify { reason, .. } => proxy.push(reason),
            _ => {}
        }
    }
    (engine, proxy)
}

fn reserve(chunks: u32, tokens: u32) -> sender::Event {
    let reserve = Reserve {
        req: "1".into(),
        to: crate::setup::target(),
        keys: keys("1", chunks),
        tokens,
        upto: 0,
        overlap: false,
        ..Reserve::example()
    };
    sender::Event::Reserve(ENGINE, reserve)
}

/// The engine already knows that the old request has ended, but the receiver has not answered the
/// last message yet.
#[test]
fn a_reservation_does_not_wait_for_the_last_words_of_the_one_before() {
    let mut p = Sender::new(crate::setup::sender(4));
    let linked = sender::Event::Linked {
        to: crate::setup::target(),
        epoch: OURS,
        slots: SLOTS,
        transport: "tcp".into(),
        v: VERSION,
        cancels: false,
    };
    told(&mut p, Time(1), reserve(2, 2 * CHUNK));
    told(&mut p, Time(2), linked.clone());
    let lost = sender::Event::LinkLost {
        to: crate::setup::target(),
        reason: Reason::PeerLost,
    };
    let ends = told(&mut p, Time(3), lost);
    assert_eq!(ends.0, [Some(Reason::PeerLost)]);
    assert_eq!(p.gauges().requests, 1, "its question is to be taken back");
    let ends = told(&mut p, Time(4), reserve(2, 2 * CHUNK));
    assert_eq!(ends, (vec![], vec![]));
    assert_eq!(p.gauges().requests, 2);
    told(&mut p, Time(5), linked);
    // While a request is in flight, a second request with the same id is still a duplicate.
    let ends = told(&mut p, Time(6), reserve(2, 2 * CHUNK));
    assert_eq!(ends, (vec![Some(Reason::Duplicate)], vec![]));
    let mut now = Time(6);
    while let Some(due) = p.deadline() {
        now = now.max(due);
        told(&mut p, now, sender::Event::Deadline);
    }
    assert!(p.is_idle(), "something is held: {:?}", p.gauges());
}

/// LMCache's proxy waits for `ProxyNotif` even if the engine moves no KV.
#[test]
fn a_request_of_which_nothing_is_moved_has_a_word_to_the_proxy() {
    let mut p = Sender::new(crate::setup::sender(4));
    for _ in 0..2 {
        let ends = told(&mut p, Time(1), reserve(0, 2 * CHUNK));
        assert_eq!(ends.1, [Some(Reason::PushOff)]);
    }
    assert!(p.is_idle());
}
