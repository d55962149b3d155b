//! Tests of the sender with LMCache-like receivers: receivers that answer late, never, with −1 or
//! with nonsense, that already have keys, and that restart.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::setup::{CHUNK, SECOND, keys, target};
use protocol::local::{Computing, Reserve, Staged};
use protocol::message::{AllocResponse, ToReceiver, ToSender};
use protocol::sender::{self, Sender, WatchId};
use protocol::{EngineId, Epoch, Reason, RequestId, SlotIndex, Time, TransferId};

const SLOTS: u32 = 6;
const ENGINE: EngineId = EngineId(1);

/// A sender with an LMCache-like receiver.
struct Feeding {
    now: Time,
    p: Sender,
    cancels: bool,
    events: bool,
    watches: Vec<WatchId>,
    questions: Vec<ToReceiver>,
    writes: Vec<(TransferId, Vec<SlotIndex>)>,
    notices: BTreeMap<RequestId, Option<Reason>>,
    ended: BTreeMap<RequestId, Option<Reason>>,
    links: usize,
}

impl Feeding {
    fn new(cancels: bool) -> Self {
        let p = Sender::new(crate::setup::sender(SLOTS));
        Self {
            now: Time(1),
            p,
            cancels,
            events: false,
            watches: Vec::new(),
            questions: Vec::new(),
            writes: Vec::new(),
            notices: BTreeMap::new(),
            ended: BTreeMap::new(),
            links: 0,
        }
    }

    fn feed(&mut self, event: sender::Event) {
        self.p.handle(self.now, event);
        while let Some(action) = self.p.poll_action() {
            match action {
                sender::Action::Link { to } => {
                    self.links += 1;
                    self.questions.clear();
                    self.p.handle(
                        self.now,
                        sender::Event::Linked {
                            to,
                            epoch: Epoch(0),
                            v: 0,
                            slots: 100,
                            transport: "nixl".into(),
                            cancels: self.cancels,
                        },
                    );
                }
                sender::Action::Send { message, .. } => {
                    assert!(self.questions.is_empty(), "two questions at once");
                    if let ToReceiver::CancelNotif(_) = message {
                        assert!(self.cancels, "a synchronous receiver dies of it");
                    }
                    self.questions.push(message);
                }
                sender::Action::Granted(_, granted) => {
                    // If the engine uses events, it stages each chunk in a message of its own.
                    let at_once = if self.events { 1 } else { SLOTS as usize };
                    for chunks in granted.chunks.chunks(at_once) {
                        let staged = Staged {
                            req: granted.req.clone(),
                            chunks: chunks.to_vec(),
                            gather_us: 0,
                            event: self.events.then_some(chunks[0]),
                            layers: Vec::new(),
                            ..Staged::example()
                        };
                        self.p
                            .handle(self.now, sender::Event::Staged(ENGINE, staged));
                    }
                }
                sender::Action::Watch { watch, .. } => self.watches.push(watch),
                sender::Action::Write {
                    transfer,
                    pieces,
                    after,
                    ..
                } => {
                    assert_eq!(after, None, "a key is shown before its bytes stand");
                    self.writes
                        .push((transfer, pieces.iter().map(|p| p.to).collect()));
                }
                sender::Action::Notify { req, reason, .. } => {
                    assert!(self.notices.insert(req, reason).is_none());
                }
                sender::Action::Ended(_, ended) => {
                    assert!(self.ended.insert(ended.req, ended.reason).is_none());
                }
                sender::Action::Progress(_) => panic!("no decode leg may go before the notice"),
                sender::Action::Answer { .. } => panic!("no decode side fetches"),
                sender::Action::Record(_) => {}
            }
        }
        let gauges = self.p.gauges();
        assert_eq!(gauges.free + gauges.held, SLOTS);
    }

    fn reserve(&mut self, req: &str, chunks: u32, upto: u32) {
        self.feed(sender::Event::Reserve(
            ENGINE,
            Reserve {
                req: req.into(),
                to: target(),
                keys: keys(req, chunks),
                tokens: chunks * CHUNK,
                upto: upto * CHUNK,
                overlap: false,
                ..Reserve::example()
            },
        ));
    }

    fn answer(&mut self, response: AllocResponse) {
        self.feed(sender::Event::Peer {
            to: target(),
            message: ToSender::AllocResponse(response),
        });
    }

    /// Answers the open alloc request with consecutive slots, beginning with `first`, and returns
    /// the request's keys.
    fn grant(&mut self, first: i64, known: &[u32]) -> Vec<String> {
        let keys = match self.questions.pop() {
            Some(ToReceiver::AllocRequest(request)) => request.keys,
            Some(ToReceiver::CancelNotif(cancel)) => {
                self.answer(empty());
                return cancel.keys;
            }
            other => panic!("no question, but {other:?}"),
        };
        let count = i64::try_from(keys.len() - known.len()).unwrap();
        self.answer(AllocResponse {
            remote_indexes: (first..first + count).collect(),
            already_sent_indexes: known.to_vec(),
            x: None,
            ..AllocResponse::example()
        });
        keys
    }

    fn watched(&mut self, watch: WatchId, stand: bool) {
        self.feed(sender::Event::Watched { watch, stand });
    }

    fn written(&mut self) {
        for (transfer, _) in std::mem::take(&mut self.writes) {
            self.feed(sender::Event::Done {
                transfer,
                sums: Vec::new(),
                began: None,
            });
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.p.deadline().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.feed(sender::Event::Deadline);
        }
        self.now = end;
    }
}

fn empty() -> AllocResponse {
    AllocResponse {
        remote_indexes: Vec::new(),
        already_sent_indexes: Vec::new(),
        x: None,
        ..AllocResponse::example()
    }
}

/// LMCache's decode side looks only for keys without tags. If the sender pushed keys with tags, the
/// decode side would compute the prompt, and LMCache's receiver would keep slots for keys that
/// nobody reads.
#[test]
fn keys_with_tags_are_refused_before_the_receiver_hears_of_them() {
    let mut feeding = Feeding::new(true);
    // The first request makes the link, and the second request uses it.
    for req in ["a", "b"] {
        let reserve = Reserve {
            req: req.into(),
            to: target(),
            keys: (0..2).map(|i| format!("m@1@0@{i}@half@salt%1")).collect(),
            tokens: 2 * CHUNK,
            upto: 2 * CHUNK,
            overlap: false,
        };
        feeding.feed(sender::Event::Reserve(ENGINE, reserve));
        let refused = Some(&Some(Reason::KeyMismatch));
        assert_eq!(feeding.ended.get(&req.into()), refused);
        assert_eq!(feeding.notices.get(&req.into()), refused);
        assert!(feeding.questions.is_empty());
    }
    feeding.reserve("c", 1, 1);
    assert_eq!(feeding.grant(10, &[]).len(), 1);
    feeding.written();
    assert_eq!(feeding.notices[&"c".into()], None);
    assert!(feeding.p.is_idle());
}

#[test]
fn every_chunk_is_asked_for_once_it_stands_ready() {
    for cancels in [false, true] {
        let mut feeding = Feeding::new(cancels);
        feeding.reserve("a", 5, 2);
        assert_eq!(feeding.grant(10, &[1]).len(), 2);
        let computing = Computing {
            req: "a".into(),
            upto: 5 * CHUNK,
            ..Computing::example()
        };
        feeding.feed(sender::Event::Computing(ENGINE, computing));
        feeding.written();
        assert!(feeding.notices.is_empty(), "three are still to come");
        let Some(ToReceiver::AllocRequest(last)) = feeding.questions.last() else {
            panic!("no question");
        };
        assert!(last.is_last_batch && last.total_chunks == 5 && last.keys.len() == 3);
        feeding.grant(20, &[]);
        feeding.written();
        assert_eq!(feeding.notices[&RequestId::from("a")], None);
        assert!(feeding.p.is_idle());
    }
}

/// The engine may be killed before its GPU has finished the gather. If the sender asked for the key
/// earlier, the receiver would show a key whose KV is never written.
#[test]
fn no_key_is_asked_for_before_its_event_has_fired() {
    let mut feeding = Feeding::new(true);
    feeding.events = true;
    feeding.reserve("a", 3, 3);
    feeding.pass(SECOND);
    assert!(feeding.questions.is_empty(), "nothing is gathered");
    let [first, second, third] = feeding.watches[..] else {
        panic!("a watch for each event");
    };
    feeding.watched(first, true);
    assert_eq!(feeding.grant(10, &[]), ["a/0"]);
    feeding.watched(second, true);
    feeding.watched(third, true);
    assert_eq!(feeding.grant(20, &[]), ["a/1"]);
    assert_eq!(feeding.grant(30, &[]), ["a/2"]);
    feeding.written();
    assert_eq!(feeding.notices[&RequestId::from("a")], None);
    assert!(feeding.p.is_idle());
}

#[test]
fn an_event_that_never_fires_ends_the_request_without_a_question() {
    let mut feeding = Feeding::new(true);
    feeding.events = true;
    feeding.reserve("a", 3, 3);
    let watches = std::mem::take(&mut feeding.watches);
    feeding.watched(watches[0], false);
    let failed = Some(Reason::TransferFailed);
    assert_eq!(feeding.notices[&RequestId::from("a")], failed);
    // Later events of the ended request change nothing, although its slots now belong to another
    // request.
    feeding.events = false;
    feeding.reserve("b", 3, 3);
    feeding.watched(watches[1], true);
    feeding.watched(watches[2], false);
    assert_eq!(feeding.grant(10, &[]), ["b/0", "b/1", "b/2"]);
    feeding.written();
    assert_eq!(feeding.notices[&RequestId::from("b")], None);
    assert!(feeding.p.is_idle());
}

#[test]
fn an_engine_that_dies_before_its_gather_leaves_no_key() {
    let mut feeding = Feeding::new(false);
    feeding.events = true;
    feeding.reserve("a", 3, 3);
    feeding.feed(sender::Event::EngineGone(ENGINE));
    for watch in std::mem::take(&mut feeding.watches) {
        feeding.watched(watch, false);
    }
    assert!(feeding.questions.is_empty() && feeding.p.is_idle());
}

#[test]
fn nothing_to_move_is_said_at_once() {
    let mut feeding = Feeding::new(true);
    feeding.reserve("a", 0, 0);
    assert_eq!((feeding.links, feeding.questions.len()), (0, 0));
    assert_eq!(feeding.notices[&RequestId::from("a")], None);
    assert_eq!(feeding.ended[&RequestId::from("a")], None);
    assert!(feeding.p.is_idle());
}

#[test]
fn a_receiver_that_never_answers_costs_its_requests_only_time() {
    for cancels in [false, true] {
        let mut feeding = Feeding::new(cancels);
        feeding.reserve("a", 2, 2);
        feeding.reserve("b", 2, 2);
        feeding.pass(10 * SECOND);
        for req in ["a", "b"] {
            assert_eq!(
                feeding.notices[&RequestId::from(req)],
                Some(Reason::AllocTimeout)
            );
        }
        assert!(feeding.p.is_idle());
        // The receiver answers late. The sender must give the keys back. If the sender kept the
        // keys, the receiver would show keys whose KV is never written.
        feeding.grant(0, &[]);
        let given_back = feeding.questions.pop();
        match given_back {
            Some(ToReceiver::CancelNotif(cancel)) => assert_eq!(cancel.keys, ["a/0", "a/1"]),
            other => assert!(!cancels && other.is_none(), "{other:?}"),
        }
    }
}

#[test]
fn no_room_ends_a_request_and_gives_back_what_it_had() {
    let mut feeding = Feeding::new(true);
    feeding.reserve("a", 4, 2);
    feeding.grant(0, &[]);
    feeding.written();
    let computing = Computing {
        req: "a".into(),
        upto: 4 * CHUNK,
        ..Computing::example()
    };
    feeding.feed(sender::Event::Computing(ENGINE, computing));
    feeding.questions.clear();
    feeding.answer(AllocResponse {
        remote_indexes: vec![-1, -1],
        already_sent_indexes: Vec::new(),
        x: None,
        ..AllocResponse::example()
    });
    assert_eq!(feeding.notices[&RequestId::from("a")], Some(Reason::NoRoom));
    assert_eq!(feeding.grant(0, &[]), ["a/0", "a/1"]);
    assert!(feeding.p.is_idle());
}

#[test]
fn keys_of_writes_that_may_still_land_are_not_given_back() {
    let mut feeding = Feeding::new(true);
    feeding.reserve("a", 2, 2);
    feeding.grant(0, &[]);
    let (transfer, _) = feeding.writes.pop().unwrap();
    feeding.feed(sender::Event::Failed {
        transfer,
        terminal: false,
    });
    assert_eq!(
        feeding.notices[&RequestId::from("a")],
        Some(Reason::TransferFailed)
    );
    assert!(feeding.questions.is_empty());
    assert!(feeding.p.is_idle());
}

#[test]
fn a_receiver_that_restarts_is_linked_anew() {
    let mut feeding = Feeding::new(false);
    feeding.reserve("a", 2, 2);
    let lost = sender::Event::LinkLost {
        to: target(),
        reason: Reason::PeerLost,
    };
    feeding.feed(lost);
    assert_eq!(
        feeding.notices[&RequestId::from("a")],
        Some(Reason::PeerLost)
    );
    feeding.reserve("b", 2, 2);
    assert_eq!(feeding.links, 2);
    feeding.grant(0, &[]);
    feeding.written();
    assert_eq!(feeding.notices[&RequestId::from("b")], None);
    assert!(feeding.p.is_idle());
}

#[test]
fn nonsense_as_an_answer_ends_the_request() {
    for wrong in [vec![0], vec![0, 0], vec![0, 100], vec![0, 1, 2], vec![]] {
        let mut feeding = Feeding::new(true);
        feeding.reserve("a", 2, 2);
        feeding.questions.clear();
        feeding.answer(AllocResponse {
            remote_indexes: wrong,
            already_sent_indexes: Vec::new(),
            x: None,
            ..AllocResponse::example()
        });
        assert!(feeding.writes.is_empty());
        assert_eq!(feeding.ended[&RequestId::from("a")], Some(Reason::NoRoom));
        assert!(feeding.p.is_idle());
    }
}
