//! Tests of reused ids, alloc requests of other senders, and KV that no decode request asks for.

use std::time::Duration;

use crate::setup::{CHUNK, SECOND, keys, question};
use protocol::local::{Await, OfRequest, Release};
use protocol::message::{AllocX, CancelNotif, ToReceiver, ToSender, Written};
use protocol::receiver::{Action, Config, Event, Receiver, Route, SenderId};
use protocol::{EngineId, Epoch, LeaseId, Reason, RequestId, SlotIndex, Time};

const OURS: Epoch = Epoch(100);
const ENGINE: EngineId = EngineId(1);
const SLOTS: u32 = 8;

/// Granted lease and its slots, or the reason of the refusal.
type Answer = Result<(LeaseId, Vec<u32>), Reason>;

struct Port {
    d: Receiver,
    now: Time,
    seq: u64,
    answers: Vec<(u64, Answer)>,
    lent: Vec<u32>,
    unwanted: Vec<Route>,
    fences: Vec<(SenderId, LeaseId)>,
    ready: usize,
    ended: Vec<Option<Reason>>,
}

impl Port {
    /// Returns a receiver with two connections. Connection 1 belongs to a sender; connection 2
    /// belongs to a peer on another host.
    fn new() -> Self {
        let d = Receiver::new(Config {
            epoch: OURS,
            max_requests: 16,
            ..crate::setup::receiver(SLOTS)
        });
        let mut port = Self {
            d,
            now: Time(1),
            seq: 0,
            answers: Vec::new(),
            lent: Vec::new(),
            unwanted: Vec::new(),
            fences: Vec::new(),
            ready: 0,
            ended: Vec::new(),
        };
        for (route, host) in [(1, "10.0.0.1"), (2, "10.0.0.66"), (3, "10.0.0.1")] {
            let (route, host) = (Route(route), host.to_owned());
            port.feed(Event::Connected {
                route,
                host,
                principal: None,
            });
        }
        port
    }

    fn feed(&mut self, event: Event) {
        self.d.handle(self.now, event);
        while let Some(action) = self.d.poll_action() {
            match action {
                Action::Send {
                    message: ToSender::AllocResponse(response),
                    ..
                } => {
                    let slots = response.remote_indexes.iter();
                    let slots: Vec<u32> = slots.filter_map(|&i| u32::try_from(i).ok()).collect();
                    match response.x {
                        Some(x) => {
                            let got = match (x.reason, x.lease) {
                                (None, Some(lease)) => Ok((lease, slots)),
                                (reason, _) => Err(reason.unwrap_or(Reason::Unknown)),
                            };
                            self.answers.push((x.seq, got));
                        }
                        None => self.lent = slots,
                    }
                }
                Action::Send {
                    route,
                    message: ToSender::Unwanted(_),
                } => self.unwanted.push(route),
                Action::Ready(engine, ready) => {
                    self.ready += ready.chunks.len();
                    let (req, chunks) = (ready.req, ready.chunks);
                    let read = Release {
                        req,
                        chunks,
                        scatter_us: 0,
                        ..Release::example()
                    };
                    self.d.handle(self.now, Event::Release(engine, read));
                }
                Action::Ended(_, ended) => self.ended.push(ended.reason),
                Action::Fence { sender, lease, .. } => self.fences.push((sender, lease)),
                Action::CheckCanary { slots } => {
                    let there = Vec::new();
                    self.d
                        .handle(self.now, Event::CanaryChecked { gone: slots, there });
                }
                _ => {}
            }
        }
    }

    fn x(&mut self, chunks: u32) -> AllocX {
        self.seq += 1;
        AllocX {
            seq: self.seq,
            id: "p".into(),
            epoch: Epoch(1),
            to_epoch: OURS,
            tokens: chunks * CHUNK,
            lease_ms: 3000,
            wait_ms: 5000,
            park_ms: 0,
            transport: "tcp".into(),
            ..AllocX::example()
        }
    }

    fn say(&mut self, route: u64, message: ToReceiver) {
        let route = Route(route);
        self.feed(Event::Peer { route, message });
    }

    fn ask(&mut self, req: &str, chunks: u32) -> u64 {
        let x = self.x(chunks);
        self.say(1, ToReceiver::AllocRequest(question(req, chunks, Some(x))));
        self.seq
    }

    fn answer(&self, seq: u64) -> Option<Answer> {
        let mut of = self.answers.iter().filter(|(answered, _)| *answered == seq);
        of.next_back().map(|(_, answer)| answer.clone())
    }

    fn write(&mut self, seq: u64) {
        let answer = self.answer(seq);
        let Some(Ok((lease, indexes))) = answer else {
            panic!("question {seq} has no slots: {answer:?}");
        };
        let written = Written {
            lease,
            epoch: OURS,
            chunks: (0..).take(indexes.len()).collect(),
            indexes,
            sums: Vec::new(),
            ..Written::example()
        };
        self.say(1, ToReceiver::Written(written));
    }

    fn park(&mut self, req: &str, chunks: u32) {
        self.feed(Event::Await(ENGINE, awaited(req, chunks)));
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.d.deadline().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.feed(Event::Deadline);
        }
        self.now = end;
    }

    fn at_rest(&mut self) {
        self.pass(60 * SECOND);
        for (sender, lease) in std::mem::take(&mut self.fences) {
            let lease = Some(lease);
            self.feed(Event::Fenced { sender, lease });
        }
        assert!(self.d.is_idle(), "something is held: {:?}", self.d.gauges());
    }
}

fn awaited(req: &str, chunks: u32) -> Await {
    Await {
        req: RequestId::from(req),
        keys: keys(req, chunks),
        tokens: chunks * CHUNK,
        have_tokens: 0,
        deadline_ms: 60_000,
        written: false,
        ..Await::example()
    }
}

/// LMCache's proxy counts from 1 at each start, so it uses the same ids again.
#[test]
fn an_id_that_comes_again_works_like_the_first() {
    let mut port = Port::new();
    for round in 1..=3usize {
        let seq = port.ask("1", 2);
        port.write(seq);
        port.park("1", 2);
        assert_eq!((port.ready, port.ended.len()), (2 * round, round));
        assert_eq!(port.ended.last(), Some(&None));
    }
    // After a request without KV has ended, both sides can use the id again.
    port.ask("1", 2);
    let id = RequestId::from("1");
    port.park("1", 2);
    port.feed(Event::Abort(ENGINE, OfRequest { req: id }));
    let seq = port.ask("1", 2);
    port.write(seq);
    port.park("1", 2);
    assert_eq!(port.ready, 8, "{:?}", port.ended);
    port.at_rest();
}

/// A late repetition of an alloc request, and the late first message of a side, belong to the
/// request that has ended.
#[test]
fn what_belongs_to_an_end_is_told_it() {
    let mut port = Port::new();
    let x = port.x(2);
    let asked = ToReceiver::AllocRequest(question("r", 2, Some(x)));
    port.say(1, asked.clone());
    port.write(port.seq);
    port.park("r", 2);
    assert_eq!(port.ended, [None]);
    port.say(1, asked);
    assert_eq!(port.answer(1), Some(Err(Reason::Duplicate)));
    // The abort comes before the sender's alloc request.
    let req = RequestId::from("late");
    port.feed(Event::Abort(ENGINE, OfRequest { req }));
    let seq = port.ask("late", 2);
    assert_eq!(port.answer(seq), Some(Err(Reason::Unwanted)));
    let seq = port.ask("late", 2);
    port.write(seq);
    port.at_rest();
}

/// The KV of the last request with the id is written, but no decode request has asked for this KV.
#[test]
fn an_unread_use_makes_way_for_the_next() {
    let mut port = Port::new();
    let first = port.ask("1", 2);
    port.write(first);
    let second = port.ask("1", 3);
    assert!(port.answer(second).is_some_and(|a| a.is_ok()));
    port.write(second);
    port.park("1", 3);
    assert_eq!((port.ready, &port.ended[..]), (3, &[None][..]));
    port.at_rest();
}

#[test]
fn a_cancel_of_lmcache_ends_what_there_is_and_nothing_to_come() {
    let mut port = Port::new();
    for req in ["1", "2", "3"] {
        let cancel = CancelNotif {
            req_id: req.into(),
            keys: Vec::new(),
            x: None,
            ..CancelNotif::example()
        };
        port.say(2, ToReceiver::CancelNotif(cancel));
    }
    for req in ["1", "2", "3"] {
        let seq = port.ask(req, 2);
        assert!(
            matches!(port.answer(seq), Some(Ok(_))),
            "{req}: {:?}",
            port.answer(seq)
        );
        port.write(seq);
        port.park(req, 2);
    }
    assert_eq!(port.ended, [None; 3]);
    port.at_rest();
}

#[test]
fn a_question_with_other_keys_does_not_end_who_waits() {
    let mut port = Port::new();
    port.park("r", 2);
    let x = port.x(3);
    port.say(2, ToReceiver::AllocRequest(question("r", 3, Some(x))));
    assert_eq!(port.answer(1), Some(Err(Reason::KeyMismatch)));
    assert_eq!(port.ended, [], "the decode request was ended by anybody");
    let seq = port.ask("r", 2);
    port.write(seq);
    assert_eq!(port.ended, [None]);
    // If the keys differ and no other sender comes, the parked request ends 1 s later with `KeyMismatch`.
    port.park("s", 2);
    port.ask("s", 3);
    port.pass(SECOND);
    assert_eq!(port.ended, [None, Some(Reason::KeyMismatch)]);
    port.at_rest();
}

/// The tokens are equal, but the salts or the adapters differ: the keys of one side have a tag, and the keys
/// of the other side have no tag. A sender of an earlier release also computes keys without tags.
#[test]
fn a_tag_of_one_side_alone_is_another_key() {
    let tagged = |keys: &mut Vec<String>, tag| keys.iter_mut().for_each(|key| *key += tag);
    for (parked, asked) in [
        ("", "@salt%1"),
        ("@salt%1", ""),
        ("@salt%1", "@salt%2"),
        ("@salt%1", "@lora%1"),
    ] {
        let mut port = Port::new();
        let mut request = awaited("r", 2);
        tagged(&mut request.keys, parked);
        port.feed(Event::Await(ENGINE, request));
        let x = port.x(2);
        let mut other = question("r", 2, Some(x));
        tagged(&mut other.keys, asked);
        port.say(2, ToReceiver::AllocRequest(other));
        assert_eq!(
            port.answer(1),
            Some(Err(Reason::KeyMismatch)),
            "{parked} {asked}"
        );
        port.pass(SECOND);
        assert_eq!(
            (port.ready, &port.ended[..]),
            (0, &[Some(Reason::KeyMismatch)][..])
        );
        port.at_rest();
    }
}

/// The receiver may send the id of a lease only to the host that got the lease, because a process
/// that knows the id can free the lease's slots.
#[test]
fn quarantined_leases_are_told_to_their_host_only() {
    let mut port = Port::new();
    port.ask("r", 2);
    port.feed(Event::PeerLost { route: Route(1) });
    assert_eq!(port.d.gauges().quarantined, 2);
    port.unwanted.clear();
    for route in [2, 3] {
        let x = port.x(1);
        let req = format!("of {route}");
        port.say(route, ToReceiver::AllocRequest(question(&req, 1, Some(x))));
    }
    assert_eq!(port.unwanted, [Route(3)]);
}

#[test]
fn one_connection_does_not_fill_the_table() {
    let mut port = Port::new();
    for n in 0..40 {
        let x = port.x(SLOTS - 1);
        let asked = question(&format!("flood {n}"), SLOTS - 1, Some(x));
        port.say(2, ToReceiver::AllocRequest(asked));
    }
    assert_eq!(port.answer(40), Some(Err(Reason::Busy)));
    assert!(port.d.gauges().requests <= 8, "{:?}", port.d.gauges());
    port.park("r", 1);
    assert_eq!(port.ended, [], "the engine's own request has room");
    let seq = port.ask("r", 1);
    port.write(seq);
    assert_eq!(port.ended, [None]);
    port.at_rest();
}

/// LMCache's proxy sends decode requests that do not ask for KV.
#[test]
fn kv_that_nobody_reads_makes_room() {
    let mut port = Port::new();
    for n in 0..20 {
        let seq = port.ask(&format!("{n}"), 3);
        port.pass(SECOND / 2);
        assert!(
            matches!(port.answer(seq), Some(Ok(_))),
            "request {n}: {:?}",
            port.answer(seq)
        );
        port.write(seq);
    }
    port.at_rest();
}

/// A decode request may still be queued in its engine. The receiver must not free this request's KV
/// for a newer request.
#[test]
fn kv_that_is_read_is_kept_for_who_comes_late() {
    let mut port = Port::new();
    let seq = port.ask("first", 2);
    port.write(seq);
    port.park("first", 2);
    for req in ["a", "b"] {
        let seq = port.ask(req, 4);
        port.write(seq);
    }
    let c = port.ask("c", 4);
    port.pass(4 * SECOND);
    assert_eq!(port.answer(c), None, "it waits");
    port.park("a", 4);
    port.park("b", 4);
    assert_eq!(port.ended, [None; 3]);
    assert!(matches!(port.answer(c), Some(Ok(_))));
    port.write(c);
    port.at_rest();
}

#[test]
fn slots_lent_to_lmcache_make_room_too() {
    let mut port = Port::new();
    let sender = SenderId {
        id: "10.0.0.1/pid".into(),
        epoch: Epoch(0),
    };
    let (route, linked) = (Route(1), true);
    port.feed(Event::Introduced {
        route,
        sender,
        linked,
    });
    for n in 0..10 {
        port.lent.clear();
        let asked = question(&format!("{n}"), 4, None);
        port.say(1, ToReceiver::AllocRequest(asked));
        port.pass(SECOND);
        assert_eq!(port.lent.len(), 4, "request {n} was declined");
        let gone = port.lent.iter().map(|&slot| SlotIndex(slot)).collect();
        let there = Vec::new();
        port.feed(Event::CanaryChecked { gone, there });
        port.pass(SECOND / 5);
    }
    port.at_rest();
}
