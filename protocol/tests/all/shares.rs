//! Tests of the quota of one host for requests that are not parked. The quota is per address,
//! because a peer can choose its name but not its address.

use std::time::Duration;

use crate::setup::{CHUNK, SECOND, keys, question};
use protocol::local::Await;
use protocol::message::{AllocRequest, AllocX, ToReceiver, ToSender};
use protocol::receiver::{Action, Config, Event, Receiver, Route};
use protocol::{EngineId, Epoch, Reason, RequestId, Time};

const SLOTS: u32 = 32;
const OURS: Epoch = Epoch(100);

struct Port {
    d: Receiver,
    now: Time,
    seq: u64,
    /// Number of each alloc request, and its answer: the number of granted slots, or the reason of
    /// the refusal.
    answers: Vec<(u64, Result<usize, Reason>)>,
}

impl Port {
    /// Returns a receiver with connections of two hosts. Connections 1 and 3 belong to a malicious
    /// peer; connection 2 belongs to a sender.
    fn new() -> Self {
        let d = Receiver::new(Config {
            epoch: OURS,
            max_requests: 64,
            max_quarantined: 4,
            ..crate::setup::receiver(SLOTS)
        });
        let mut port = Self {
            d,
            now: Time(1),
            seq: 0,
            answers: Vec::new(),
        };
        for (route, host) in [(1, "10.0.0.66"), (2, "10.0.0.2"), (3, "10.0.0.66")] {
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
            if let Action::Send {
                message: ToSender::AllocResponse(response),
                ..
            } = action
            {
                let x = response.x.expect("an answer to one of ours");
                let slots = response.remote_indexes.iter().filter(|i| **i >= 0);
                let got = x.reason.map_or(Ok(slots.count()), Err);
                self.answers.push((x.seq, got));
            }
        }
    }

    /// Sends an alloc request for a very short lease and returns the alloc request's number.
    fn ask(&mut self, route: u64, id: &str, req: &str, chunks: u32) -> u64 {
        self.seq += 1;
        let x = AllocX {
            seq: self.seq,
            id: id.into(),
            epoch: Epoch(self.seq),
            to_epoch: OURS,
            tokens: chunks * CHUNK,
            lease_ms: 0,
            wait_ms: 1000,
            park_ms: 0,
            transport: "nixl".into(),
            ..AllocX::example()
        };
        let asked = question(req, chunks, Some(x));
        let message = ToReceiver::AllocRequest(asked);
        let route = Route(route);
        self.feed(Event::Peer { route, message });
        self.seq
    }

    fn answer(&self, seq: u64) -> Option<Result<usize, Reason>> {
        let of = self.answers.iter().find(|(answered, _)| *answered == seq);
        of.map(|(_, answer)| *answer)
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
        self.feed(Event::Deadline);
    }
}

#[test]
fn a_stranger_does_not_get_all_of_the_buffer() {
    let mut port = Port::new();
    let all = port.ask(1, "x", "all", SLOTS);
    assert_eq!(port.answer(all), Some(Err(Reason::TooLarge)));
    let most = port.ask(1, "x", "most", SLOTS - 2);
    assert_eq!(port.answer(most), Some(Ok(30)));
    // Another name or another connection does not give the malicious peer more slots. The peer's
    // requests wait for the quota, but they do not block the honest sender.
    let more = [(1, "y"), (3, "z")].map(|(route, id)| port.ask(route, id, id, 1));
    let honest = port.ask(2, "p", "honest", 2);
    assert_eq!(port.answer(honest), Some(Ok(2)));
    assert_eq!(more.map(|seq| port.answer(seq)), [None; 2]);
    // The malicious peer asked for a lease of 0 ms, but the receiver keeps the lease for the
    // minimum time.
    port.pass(SECOND / 2);
    assert_eq!(port.d.gauges().quarantined, 0);
    port.pass(SECOND);
    assert_eq!(
        more.map(|seq| port.answer(seq)),
        [Some(Err(Reason::NoRoom)); 2]
    );
    assert_eq!(port.d.gauges().quarantined, SLOTS, "both were silent");
}

#[test]
fn what_a_host_left_counts_against_its_share() {
    let mut port = Port::new();
    for n in 0..15 {
        let seq = port.ask(1, &format!("x{n}"), &format!("r{n}"), 2);
        assert_eq!(port.answer(seq), Some(Ok(2)));
        port.pass(2 * SECOND);
    }
    assert_eq!(port.d.gauges().quarantined, 30);
    let one = port.ask(1, "new", "one", 1);
    port.pass(2 * SECOND);
    assert_eq!(port.answer(one), Some(Err(Reason::NoRoom)));
    let honest = port.ask(2, "p", "honest", 2);
    assert_eq!(port.answer(honest), Some(Ok(2)));
}

/// A parked request shows that its engine waits for the sender, so its slots do not count against a
/// quota.
#[test]
fn a_parked_request_has_no_share() {
    let mut port = Port::new();
    let parked = Await {
        req: RequestId::from("r"),
        keys: keys("r", SLOTS),
        tokens: SLOTS * CHUNK,
        have_tokens: 0,
        deadline_ms: 60_000,
        written: false,
        ..Await::example()
    };
    port.feed(Event::Await(EngineId(1), parked));
    let seq = port.ask(1, "p", "r", SLOTS);
    assert_eq!(port.answer(seq), Some(Ok(32)));
}

/// LMCache's senders send no name, so the quota uses the host of their connection.
#[test]
fn lmcache_has_the_share_of_its_host() {
    let mut port = Port::new();
    let sender = protocol::receiver::SenderId {
        id: "10.0.0.66/pid".into(),
        epoch: Epoch(0),
    };
    let linked = true;
    let route = Route(1);
    port.feed(Event::Introduced {
        route,
        sender,
        linked,
    });
    let mut answer = |asked: AllocRequest| {
        let message = ToReceiver::AllocRequest(asked);
        port.d.handle(port.now, Event::Peer { route, message });
        let mut slots = None;
        while let Some(action) = port.d.poll_action() {
            if let Action::Send {
                message: ToSender::AllocResponse(response),
                ..
            } = action
            {
                slots = Some(response.remote_indexes.len());
            }
        }
        slots
    };
    assert_eq!(answer(question("all", SLOTS, None)), Some(0), "declined");
    assert_eq!(answer(question("most", SLOTS - 2, None)), Some(30));
    assert_eq!(answer(question("more", 1, None)), None, "it waits");
    let honest = port.ask(2, "p", "honest", 2);
    assert_eq!(port.answer(honest), Some(Ok(2)));
}
