//! Principals: leases, quarantine, cancels, repetitions and quotas belong to the party whose key a connection has proved.
//! Names, epochs, lease ids and hosts prove nothing.

use crate::setup::{CHUNK, SECOND, question};
use protocol::message::{
    AllocX, CancelNotif, CancelX, Extend, Slots, ToReceiver, ToSender, Written,
};
use protocol::receiver::{Action, Config, Event, Principal, Receiver, Route};
use protocol::{Epoch, LeaseId, Reason, Time};

const OURS: Epoch = Epoch(100);
const SLOTS: u32 = 32;

struct Port {
    d: Receiver,
    now: Time,
    seq: u64,
    sent: Vec<(Route, ToSender)>,
    closed: usize,
}

/// Connections: 1 and 2 of the principal `a` (2 after a reconnection from another host), 3 of `b` on the host of
/// connection 1, 4 without a key on the host of connection 1.
fn port() -> Port {
    let mut port = Port {
        d: Receiver::new(Config {
            epoch: OURS,
            max_requests: 16,
            ..crate::setup::receiver(SLOTS)
        }),
        now: Time(1),
        seq: 0,
        sent: Vec::new(),
        closed: 0,
    };
    for (route, host, principal) in [
        (1, "10.0.0.1", Some("a")),
        (2, "10.0.0.2", Some("a")),
        (3, "10.0.0.1", Some("b")),
        (4, "10.0.0.1", None),
    ] {
        port.feed(Event::Connected {
            route: Route(route),
            host: host.to_owned(),
            principal: principal.map(|name| Principal(name.to_owned())),
        });
    }
    port
}

impl Port {
    fn feed(&mut self, event: Event) {
        self.d.handle(self.now, event);
        while let Some(action) = self.d.poll_action() {
            match action {
                Action::Send { route, message } => self.sent.push((route, message)),
                Action::Close { .. } => self.closed += 1,
                _ => {}
            }
        }
    }

    fn say(&mut self, route: u64, message: ToReceiver) -> Vec<ToSender> {
        self.sent.clear();
        let route = Route(route);
        self.feed(Event::Peer { route, message });
        let answers = self.sent.drain(..);
        let answers = answers.filter(|(to, _)| *to == route);
        answers.map(|(_, message)| message).collect()
    }

    /// Asks for slots under the name `p`, whatever the connection is.
    fn ask_again(
        &mut self,
        route: u64,
        req: &str,
        chunks: u32,
    ) -> Result<(LeaseId, Vec<u32>), Reason> {
        let x = AllocX {
            seq: self.seq,
            id: "p".into(),
            epoch: Epoch(1),
            to_epoch: OURS,
            tokens: chunks * CHUNK,
            lease_ms: 3000,
            wait_ms: 0,
            park_ms: 0,
            transport: "tcp".into(),
            ..AllocX::example()
        };
        let asked = ToReceiver::AllocRequest(question(req, chunks, Some(x)));
        let answers = self.say(route, asked);
        let answer = answers.iter().find_map(|answer| match answer {
            ToSender::AllocResponse(response) => Some(response),
            _ => None,
        });
        let answer = answer.expect("an answer");
        let x = answer.x.clone().unwrap();
        let slots = answer.remote_indexes.iter();
        let slots = slots.filter_map(|&i| u32::try_from(i).ok()).collect();
        match (x.reason, x.lease) {
            (None, Some(lease)) => Ok((lease, slots)),
            (reason, _) => Err(reason.unwrap_or(Reason::Unknown)),
        }
    }

    fn ask(&mut self, route: u64, req: &str, chunks: u32) -> Result<(LeaseId, Vec<u32>), Reason> {
        self.seq += 1;
        self.ask_again(route, req, chunks)
    }
}

fn cancel(lease: LeaseId) -> ToReceiver {
    ToReceiver::CancelNotif(CancelNotif {
        req_id: "r".into(),
        keys: Vec::new(),
        x: Some(CancelX {
            seq: 1,
            lease,
            epoch: OURS,
            reason: Reason::Cancelled,
            dirty: Vec::new(),
            ..CancelX::example()
        }),
        ..CancelNotif::example()
    })
}

fn written(lease: LeaseId, slots: &[u32]) -> Written {
    Written {
        lease,
        epoch: OURS,
        chunks: (0..).take(slots.len()).collect(),
        indexes: slots.to_vec(),
        sums: vec![7; slots.len()],
        ..Written::example()
    }
}

fn is_unknown(answers: &[ToSender]) -> bool {
    matches!(answers, [ToSender::Unwanted(unwanted)] if unwanted.reason == Reason::LeaseExpired)
}

/// Another member, or a peer without a key, that knows the lease's id, the sender's name and its epoch can neither end
/// the lease nor show its chunks nor extend it. It gets the answer for an unknown lease. The lease's own principal can
/// do all of it, also over another connection from another host.
#[test]
fn only_the_principal_of_a_lease_may_act_for_it() {
    for other in [3, 4] {
        let mut port = port();
        let (lease, slots) = port.ask(1, "r", 4).unwrap();
        assert_eq!((slots.len(), port.d.gauges().held), (4, 4));
        let message = written(lease, &slots);
        assert!(is_unknown(
            &port.say(other, ToReceiver::Written(message.clone()))
        ));
        let (epoch, indexes) = (OURS, slots.clone());
        let writing = Slots {
            lease,
            epoch,
            indexes,
            ..Slots::example()
        };
        assert!(is_unknown(&port.say(other, ToReceiver::Writing(writing))));
        let extend = Extend {
            lease,
            epoch,
            granted: Vec::new(),
            ..Extend::example()
        };
        assert!(is_unknown(&port.say(other, ToReceiver::Extend(extend))));
        // A cancel is answered, so that a peer does not repeat it for ever, but it changes nothing.
        port.say(other, cancel(lease));
        assert_eq!(
            (port.d.gauges().held, port.d.gauges().writing, port.closed),
            (4, 0, 0)
        );
        // Wrong checksums of another member do not count against the lease.
        assert_eq!(port.d.unchecked(Route(other), &message), []);
        assert_eq!(port.d.unchecked(Route(2), &message).len(), 4);

        assert!(matches!(
            port.say(2, ToReceiver::Written(message))[..],
            [ToSender::Ack(_)]
        ));
        assert_eq!(port.closed, 4, "the slots of written chunks are closed");
    }
}

/// A repetition of an alloc request tells the lease's id. Only the lease's principal gets it; another one cannot take the
/// request over, on whatever host it is.
#[test]
fn a_repeated_request_tells_the_lease_to_its_principal_only() {
    let mut port = port();
    let first = port.ask(1, "r", 4).unwrap();
    assert_eq!(port.ask_again(3, "r", 4), Err(Reason::Duplicate));
    assert_eq!(port.ask_again(4, "r", 4), Err(Reason::Duplicate));
    assert_eq!(port.ask_again(2, "r", 4), Ok(first));
}

/// Slots whose writes may still arrive are told to, and freed by, the principal that had the lease. A peer with its name
/// and epoch on the same host neither learns of them nor frees them.
#[test]
fn quarantined_leases_are_told_to_their_principal_only() {
    let mut port = port();
    let (lease, slots) = port.ask(1, "r", 4).unwrap();
    port.feed(Event::PeerLost { route: Route(1) });
    assert_eq!(port.d.gauges().quarantined, 4);
    for other in [3, 4] {
        port.ask(other, &format!("r{other}"), 1).unwrap();
        let told = port
            .sent
            .iter()
            .any(|(_, m)| matches!(m, ToSender::Unwanted(_)));
        assert!(!told, "connection {other} learns of a quarantined lease");
        port.say(other, cancel(lease));
        port.say(other, ToReceiver::Written(written(lease, &slots)));
        assert_eq!(port.d.gauges().quarantined, 4, "connection {other}");
    }
    port.seq += 1;
    let x = AllocX {
        seq: port.seq,
        id: "p".into(),
        epoch: Epoch(1),
        to_epoch: OURS,
        tokens: CHUNK,
        lease_ms: 3000,
        wait_ms: 0,
        park_ms: 0,
        transport: "tcp".into(),
        ..AllocX::example()
    };
    let answers = port.say(2, ToReceiver::AllocRequest(question("again", 1, Some(x))));
    let asked = answers.iter().any(|m| matches!(m, ToSender::Unwanted(u) if u.lease == lease && u.reason == Reason::Quarantined));
    assert!(asked, "{answers:?}");
    port.say(2, cancel(lease));
    assert_eq!(port.d.gauges().quarantined, 0);
}

/// One member of the roster cannot use up the slots or the table of requests, however many connections and hosts it has.
/// The shares are counted by principal, so two members on one host have one share each.
#[test]
fn shares_are_counted_by_principal() {
    let mut port = port();
    let mut asked = 0;
    let refused = loop {
        let route = 1 + asked % 2;
        match port.ask(route, &format!("a{asked}"), 1) {
            Ok(_) => asked += 1,
            Err(reason) => break reason,
        }
        assert!(asked < 16, "one principal has the whole table");
    };
    assert_eq!(
        (refused, asked),
        (Reason::Busy, 12),
        "three quarters of the table"
    );
    port.ask(3, "b", 1).unwrap();

    let mut port = self::port();
    port.ask(1, "large", 30).unwrap();
    assert_eq!(port.ask(2, "more", 2), Err(Reason::NoRoom));
    port.ask(3, "b", 2).unwrap();
    port.feed(Event::PeerLost { route: Route(1) });
    // The quarantine of one member counts against this member, also under another name and epoch.
    assert_eq!(port.ask(2, "late", 1), Err(Reason::Quarantined));
    assert!(
        port.d
            .deadline()
            .is_none_or(|due| due <= port.now + 60 * SECOND)
    );
}
