//! Checks that neither side exchanges KV of several groups of layers with LMCache, which knows one
//! group only.

use protocol::local::Reserve;
use protocol::message::{AllocRequest, ToReceiver, ToSender};
use protocol::receiver::{self, Receiver, Route, SenderId};
use protocol::sender::{self, Sender};
use protocol::{EngineId, Epoch, Layout, Reason, Time};

use crate::setup::{self, CHUNK, group, keys, layout_of, target};

/// Returns a layout whose only group has the shape of the layout without groups.
fn one_group() -> Layout {
    let bytes = setup::layout().token_bytes().unwrap();
    layout_of(vec![group("full", bytes, 0)])
}

#[test]
fn a_sender_feeds_no_groups_to_lmcache() {
    let check = |layout, expected| {
        let mut p = Sender::new(sender::Config {
            layout,
            ..setup::sender(4)
        });
        let reserve = Reserve {
            req: "r".into(),
            to: target(),
            keys: keys("r", 2),
            tokens: 2 * CHUNK,
            upto: 2 * CHUNK,
            overlap: false,
            ..Reserve::example()
        };
        p.handle(Time(1), sender::Event::Reserve(EngineId(1), reserve));
        let linked = sender::Event::Linked {
            to: target(),
            epoch: Epoch(0),
            v: 0,
            slots: 100,
            transport: "nixl".into(),
            cancels: true,
        };
        p.handle(Time(2), linked);
        let (mut ended, mut notices, mut granted) = (Vec::new(), Vec::new(), 0);
        while let Some(action) = p.poll_action() {
            match action {
                sender::Action::Ended(_, end) => ended.push(end.reason),
                sender::Action::Notify { reason, .. } => notices.push(reason),
                sender::Action::Granted(_, grant) => granted += grant.chunks.len(),
                sender::Action::Send { message, .. } => panic!("{message:?}"),
                _ => {}
            }
        }
        assert_eq!((&ended, granted == 0), (&expected, p.is_idle()));
        assert_eq!(notices, ended);
    };
    check(setup::layout(), Vec::new());
    check(one_group(), vec![Some(Reason::LayoutMismatch)]);
}

#[test]
fn a_receiver_lends_no_slots_for_groups() {
    let check = |layout, expected: &dyn Fn(&[i64]) -> bool, reasons: &[Reason]| {
        let mut d = Receiver::new(setup::receiver_of(layout, 4));
        let sender = SenderId {
            id: "10.0.0.1/1".into(),
            epoch: Epoch(0),
        };
        let introduced = receiver::Event::Introduced {
            route: Route(1),
            sender,
            linked: true,
        };
        d.handle(Time(1), introduced);
        let asked: AllocRequest = setup::question("r", 2, None);
        let asked = receiver::Event::Peer {
            route: Route(1),
            message: ToReceiver::AllocRequest(asked),
        };
        d.handle(Time(2), asked);
        let (mut answers, mut refused) = (Vec::new(), Vec::new());
        while let Some(action) = d.poll_action() {
            match action {
                receiver::Action::Send {
                    message: ToSender::AllocResponse(response),
                    ..
                } => answers.push(response.remote_indexes),
                receiver::Action::Record(record) => refused.extend(record.reason),
                _ => {}
            }
        }
        let [answer] = &answers[..] else {
            panic!("{answers:?}");
        };
        assert!(expected(answer), "{answer:?}");
        assert_eq!(refused, reasons);
    };
    let slots = |answer: &[i64]| answer.len() == 2 && answer.iter().all(|slot| *slot >= 0);
    check(setup::layout(), &slots, &[]);
    let refusal = |answer: &[i64]| answer == [-1, -1];
    check(one_group(), &refusal, &[Reason::LayoutMismatch]);
}
