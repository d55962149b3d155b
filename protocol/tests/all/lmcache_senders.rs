//! Tests of the receiver with LMCache-like senders, over many random runs.
//!
//! The senders never report to the receiver that they have written. The senders write late or not
//! at all, report success to the proxy although an earlier batch failed, or die. The tests check
//! that the receiver still shows only written slots, ends every request and loses no slot.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::setup::{CHUNK, SECOND, keys, layout};
use protocol::local::{Await, OfRequest, Release};
use protocol::message::{AllocRequest, AllocResponse, CancelNotif, ToReceiver, ToSender};
use protocol::receiver::{self, Receiver, Route, SenderId};
use protocol::{EngineId, Epoch, Reason, RequestId, SlotIndex, Time};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SLOTS: u32 = 6;
const ENGINE: EngineId = EngineId(1);

/// A receiver with LMCache-like senders.
struct Landing {
    now: Time,
    d: Receiver,
    /// Content of each slot: the key of the written chunk; `None` if the slot contains canaries.
    slots: Vec<Option<String>>,
    /// Lent slots into which a sender may still write once, each with the key of its chunk.
    lent: BTreeMap<SlotIndex, String>,
    answers: Vec<(Route, AllocResponse)>,
    shown: BTreeMap<RequestId, BTreeMap<u32, SlotIndex>>,
    ended: BTreeMap<RequestId, Option<Reason>>,
    fences: Vec<(SenderId, protocol::LeaseId)>,
}

impl Landing {
    fn new() -> Self {
        let d = Receiver::new(receiver::Config {
            max_quarantined: 2,
            ..crate::setup::receiver(SLOTS)
        });
        Self {
            now: Time(1),
            d,
            slots: vec![None; SLOTS as usize],
            lent: BTreeMap::new(),
            answers: Vec::new(),
            shown: BTreeMap::new(),
            ended: BTreeMap::new(),
            fences: Vec::new(),
        }
    }

    fn feed(&mut self, event: receiver::Event) {
        self.d.handle(self.now, event);
        while let Some(action) = self.d.poll_action() {
            self.act(action);
        }
        let gauges = self.d.gauges();
        assert_eq!(
            gauges.free + gauges.held + gauges.quarantined,
            SLOTS,
            "{gauges:?}"
        );
    }

    fn act(&mut self, action: receiver::Action) {
        match action {
            receiver::Action::Mark { slot } => {
                assert!(!self.lent.contains_key(&slot), "{slot} is lent to two");
                self.slots[slot.0 as usize] = None;
            }
            receiver::Action::CheckCanary { slots } => {
                let written = |slot: &SlotIndex| self.slots[slot.0 as usize].is_some();
                let (gone, there) = slots.into_iter().partition(written);
                self.d
                    .handle(self.now, receiver::Event::CanaryChecked { gone, there });
            }
            receiver::Action::Send { route, message } => match message {
                ToSender::AllocResponse(response) => self.answers.push((route, response)),
                other => panic!("not a word that LMCache knows: {other:?}"),
            },
            receiver::Action::Ready(_, ready) => {
                let prompt = self.prompt_of(&ready.req);
                let shown = self.shown.entry(ready.req.clone()).or_default();
                for (&chunk, &slot) in ready.chunks.iter().zip(&ready.slots) {
                    let key = format!("{prompt}/{chunk}");
                    let found = self.slots[slot as usize].as_deref();
                    assert_eq!(found, Some(&key[..]), "{:?} chunk {chunk}", ready.req);
                    shown.insert(chunk, SlotIndex(slot));
                }
            }
            receiver::Action::Ended(_, ended) => {
                assert!(self.ended.insert(ended.req, ended.reason).is_none());
            }
            receiver::Action::Fence { sender, lease, .. } => self.fences.push((sender, lease)),
            receiver::Action::Open { .. } | receiver::Action::Close { .. } => {}
            receiver::Action::Ask { .. } => panic!("no prefill side keeps KV"),
            receiver::Action::Record(_) => {}
        }
    }

    /// Returns the prompt of a request: requests with the same prompt have the same keys.
    fn prompt_of(&self, req: &RequestId) -> String {
        req.0.split('#').next().unwrap_or_default().to_owned()
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.d.deadline().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.feed(receiver::Event::Deadline);
        }
        self.now = end;
    }

    fn connect(&mut self, route: u64, linked: bool) {
        self.feed(receiver::Event::Introduced {
            route: Route(route),
            sender: SenderId {
                id: format!("10.0.0.{route}/1"),
                epoch: Epoch(0),
            },
            linked,
        });
    }

    /// Sends an alloc request and returns the lent slots; `None` if the receiver declined.
    fn ask(
        &mut self,
        route: u64,
        req: &str,
        chunks: std::ops::Range<u32>,
        total: u32,
    ) -> Option<Vec<i64>> {
        let named = !req.starts_with("sync");
        let prompt = self.prompt_of(&req.into());
        let keys: Vec<String> = chunks.clone().map(|i| format!("{prompt}/{i}")).collect();
        let request = AllocRequest {
            keys: keys.clone(),
            fmt: 1,
            shape: layout().shape(CHUNK),
            dtype: "float".into(),
            last_chunk_toks: CHUNK,
            req_id: if named { req.into() } else { String::new() },
            is_last_batch: chunks.end == total,
            total_chunks: if named { total } else { 0 },
            x: None,
            ..AllocRequest::example()
        };
        self.feed(receiver::Event::Peer {
            route: Route(route),
            message: ToReceiver::AllocRequest(request),
        });
        self.pass(2 * SECOND);
        let at = self
            .answers
            .iter()
            .position(|(r, _)| *r == Route(route))
            .expect("an answer within its bound");
        let (_, response) = self.answers.remove(at);
        let indexes = response.remote_indexes;
        if indexes.is_empty() {
            assert_eq!(
                response.already_sent_indexes.len(),
                keys.len(),
                "declined: all or nothing"
            );
            return None;
        }
        assert_eq!(indexes.len(), keys.len());
        for (&index, key) in indexes.iter().zip(&keys) {
            let slot = SlotIndex(u32::try_from(index).ok()?);
            assert!(
                self.lent.insert(slot, key.clone()).is_none(),
                "{slot} is lent to two"
            );
        }
        Some(indexes)
    }

    /// Writes once into each lent slot.
    fn write(&mut self, indexes: &[i64]) {
        for &index in indexes {
            let slot = SlotIndex(u32::try_from(index).unwrap());
            let key = self.lent.remove(&slot);
            self.slots[slot.0 as usize] = key;
        }
    }

    fn park(&mut self, req: &str, chunks: u32, have: u32) {
        let prompt = self.prompt_of(&req.into());
        self.feed(receiver::Event::Await(
            ENGINE,
            Await {
                req: req.into(),
                keys: keys(&prompt, chunks),
                tokens: chunks * CHUNK,
                have_tokens: have,
                deadline_ms: 20_000,
                written: true,
                ..Await::example()
            },
        ));
    }

    fn read(&mut self, req: &str) {
        let shown = self.shown.remove(&req.into()).unwrap_or_default();
        let chunks = shown.into_keys().collect();
        self.feed(receiver::Event::Release(
            ENGINE,
            Release {
                req: req.into(),
                chunks,
                scatter_us: 0,
                ..Release::example()
            },
        ));
    }

    /// Waits until every loan has expired, and checks that only unwritten slots are quarantined.
    fn rest(&mut self) {
        self.pass(40 * SECOND);
        let gauges = self.d.gauges();
        assert_eq!(gauges.held, 0, "{gauges:?}");
        // The quarantined slots are exactly the slots into which a sender may still write.
        assert_eq!(
            gauges.quarantined as usize,
            self.lent.len(),
            "{:?}",
            self.lent
        );
        for (sender, lease) in std::mem::take(&mut self.fences) {
            self.feed(receiver::Event::Fenced {
                sender,
                lease: Some(lease),
            });
        }
        self.lent.clear();
        self.pass(2 * SECOND);
        assert!(self.d.is_idle(), "{:?}", self.d);
    }
}

#[test]
fn what_is_written_and_announced_is_shown() {
    let mut landing = Landing::new();
    landing.connect(1, true);
    for (req, batches) in [("a", 1), ("b", 3), ("sync-c", 1), ("sync-d", 2)] {
        let step = 3u32.div_ceil(batches);
        for at in (0..3).step_by(step as usize) {
            let slots = landing
                .ask(1, req, at..(at + step).min(3), 3)
                .expect("there is room");
            landing.write(&slots);
        }
        landing.park(req, 3, 5);
        // The decode side already has the first chunk. The receiver shows only the two other
        // chunks.
        assert_eq!(landing.shown[&RequestId::from(req)].len(), 2);
        landing.read(req);
        assert_eq!(landing.ended[&RequestId::from(req)], None);
    }
    landing.rest();
}

#[test]
fn what_is_announced_but_not_written_is_not_shown() {
    let mut landing = Landing::new();
    landing.connect(1, true);
    let first = landing.ask(1, "sync-a", 0..2, 4).expect("there is room");
    let second = landing.ask(1, "sync-a", 2..4, 4).expect("there is room");
    // LMCache's synchronous sender reports success if the last batch succeeded.
    landing.write(&second);
    landing.park("sync-a", 4, 0);
    assert_eq!(
        landing.ended[&RequestId::from("sync-a")],
        Some(Reason::TransferFailed)
    );
    assert!(landing.shown.is_empty());
    landing.pass(5 * SECOND);
    assert_eq!(landing.d.gauges().quarantined, 2);
    // Each slot gets only one write. So after the late write the slots become free.
    landing.write(&first);
    landing.pass(5 * SECOND);
    assert!(landing.d.is_idle());
}

#[test]
fn one_prompt_of_two_senders_is_two_sets_of_slots() {
    let mut landing = Landing::new();
    landing.connect(1, true);
    landing.connect(2, true);
    let one = landing.ask(1, "p#1", 0..2, 2).expect("there is room");
    let two = landing.ask(2, "p#2", 0..2, 2).expect("there is room");
    assert!(one.iter().all(|slot| !two.contains(slot)));
    landing.write(&two);
    landing.park("p#2", 2, 0);
    landing.read("p#2");
    landing.park("p#1", 2, 0);
    assert_eq!(landing.ended[&RequestId::from("p#2")], None);
    assert_eq!(
        landing.ended[&RequestId::from("p#1")],
        Some(Reason::TransferFailed)
    );
    landing.rest();
}

#[test]
fn a_full_buffer_is_declined_within_its_bound() {
    let mut landing = Landing::new();
    landing.connect(1, true);
    landing.connect(2, true);
    landing.ask(1, "a", 0..4, 4).expect("there is room");
    assert_eq!(landing.ask(2, "b", 0..3, 3), None);
    landing.park("b", 3, 0);
    assert_eq!(landing.ended[&RequestId::from("b")], Some(Reason::NoRoom));
    // A request with more chunks than slots never fits.
    assert_eq!(landing.ask(2, "c", 0..1, 7), None);
    landing.park("c", 7, 0);
    assert_eq!(landing.ended[&RequestId::from("c")], Some(Reason::TooLarge));
    // A sender that made its handshake with an earlier start of the receiver does not know the
    // addresses of the present slots.
    landing.connect(3, false);
    assert_eq!(landing.ask(3, "d", 0..1, 1), None);
    // If the shape of a chunk is wrong, the receiver answers with LMCache's own refusal, −1.
    let odd = AllocRequest {
        keys: vec!["x".into(), "y".into()],
        fmt: 1,
        shape: vec![2, 9, 4, 1],
        dtype: "float".into(),
        last_chunk_toks: 4,
        req_id: String::new(),
        is_last_batch: false,
        total_chunks: 0,
        x: None,
        ..AllocRequest::example()
    };
    landing.feed(receiver::Event::Peer {
        route: Route(1),
        message: ToReceiver::AllocRequest(odd),
    });
    assert_eq!(landing.answers.pop().unwrap().1.remote_indexes, [-1, -1]);
    landing.rest();
}

#[test]
fn batches_of_one_request_have_their_slots_kept() {
    let mut landing = Landing::new();
    landing.connect(1, true);
    landing.connect(2, true);
    let first = landing.ask(1, "a", 0..1, 4).expect("there is room");
    assert_eq!(
        landing.ask(2, "b", 0..3, 3),
        None,
        "four of six are reserved"
    );
    let rest = landing.ask(1, "a", 1..4, 4).expect("they were reserved");
    landing.write(&first);
    landing.write(&rest);
    landing.park("a", 4, 0);
    landing.read("a");
    assert_eq!(landing.ended[&RequestId::from("a")], None);
    landing.rest();
}

#[test]
fn random_senders_leave_nothing() {
    for seed in 0..300 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut landing = Landing::new();
        for route in 1..4 {
            landing.connect(route, true);
        }
        for turn in 0..12 {
            let route = rng.random_range(1..4);
            let name = ["sync-p", "p", "q"][rng.random_range(0..3)];
            let req = format!("{name}#{turn}");
            let total = rng.random_range(1..5);
            let cut = rng.random_range(1..=total);
            let mut granted = Vec::new();
            for batch in [0..cut, cut..total] {
                if !batch.is_empty() {
                    granted.extend(landing.ask(route, &req, batch, total).unwrap_or_default());
                }
            }
            match rng.random_range(0..6) {
                0 => {} // the sender or its proxy dies
                1 => {
                    let cancel = CancelNotif {
                        req_id: req.clone(),
                        keys: Vec::new(),
                        x: None,
                        ..CancelNotif::example()
                    };
                    landing.feed(receiver::Event::Peer {
                        route: Route(route),
                        message: ToReceiver::CancelNotif(cancel),
                    });
                    assert!(landing.answers.pop().is_some());
                }
                2 => landing.feed(receiver::Event::PeerLost {
                    route: Route(route),
                }),
                3 => landing.park(&req, total, 0),
                _ => {
                    landing.write(&granted);
                    landing.park(&req, total, rng.random_range(0..total * CHUNK));
                    if rng.random_range(0..3) > 0 {
                        landing.read(&req);
                    } else {
                        let req = OfRequest {
                            req: req.as_str().into(),
                        };
                        landing.shown.remove(&req.req);
                        landing.ended.remove(&req.req);
                        landing.feed(receiver::Event::Abort(ENGINE, req));
                    }
                }
            }
            if rng.random_range(0..3) == 0 {
                let late: Vec<i64> = landing.lent.keys().map(|s| i64::from(s.0)).collect();
                landing.write(&late);
            }
            landing.pass(Duration::from_millis(rng.random_range(0..8000)));
            if let Some((_, response)) = landing.answers.pop() {
                panic!("an answer that nobody waits for: {response:?}");
            }
            if route == 3 {
                landing.connect(3, true);
            }
        }
        landing.shown.clear();
        landing.feed(receiver::Event::EngineGone(ENGINE));
        landing.rest();
    }
}
