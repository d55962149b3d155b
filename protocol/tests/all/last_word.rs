//! Tests of a sender's last message about a lost lease: without this message, the lease's slots
//! stay quarantined.

use std::time::Duration;

use crate::setup::{CHUNK, SECOND, target};
use protocol::local::{Await, Computing, Reserve};
use protocol::message::{ToReceiver, ToSender, Unwanted};
use protocol::receiver::{self, Receiver, Route};
use protocol::sender::{self, Sender};
use protocol::{EngineId, Epoch, LeaseId, Reason, RequestId, Time};

const MS: u64 = 1000;
const ROUTE: Route = Route(1);

/// A sender and a receiver whose connection the test can cut. No chunk is ever staged, so no write
/// is posted.
struct Pair {
    now: Time,
    p: Sender,
    d: Receiver,
    connected: bool,
    /// True if all messages of the receiver are lost.
    deaf: bool,
    links: usize,
    cancels: usize,
}

impl Pair {
    fn new() -> Self {
        let p = Sender::new(sender::Config {
            link: 5 * SECOND,
            ..crate::setup::sender(4)
        });
        let d = Receiver::new(crate::setup::receiver(4));
        Self {
            now: Time(1),
            p,
            d,
            connected: true,
            deaf: false,
            links: 0,
            cancels: 0,
        }
    }

    /// Carries out all actions until neither side has an action left.
    fn settle(&mut self) {
        let now = self.now;
        loop {
            if let Some(action) = self.p.poll_action() {
                match action {
                    sender::Action::Link { to } => {
                        self.links += 1;
                        let linked = sender::Event::Linked {
                            to: to.clone(),
                            epoch: Epoch(2),
                            v: 1,
                            slots: 4,
                            transport: "nixl".into(),
                            cancels: false,
                        };
                        let failed = sender::Event::LinkLost {
                            to,
                            reason: Reason::NoLink,
                        };
                        let event = if self.connected { linked } else { failed };
                        self.p.handle(now, event);
                    }
                    sender::Action::Send { message, .. } if self.connected => {
                        self.cancels += usize::from(matches!(message, ToReceiver::CancelNotif(_)));
                        let route = ROUTE;
                        self.d.handle(now, receiver::Event::Peer { route, message });
                    }
                    _ => {}
                }
            } else if let Some(action) = self.d.poll_action() {
                match action {
                    receiver::Action::Send { message, .. } if self.connected && !self.deaf => {
                        let to = target();
                        self.p.handle(now, sender::Event::Peer { to, message });
                    }
                    _ => {}
                }
            } else {
                return;
            }
        }
    }

    /// Lets time pass in steps of 50 ms.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = Time(self.now.0 + 50 * MS);
            self.p.handle(self.now, sender::Event::Deadline);
            self.d.handle(self.now, receiver::Event::Deadline);
            self.settle();
        }
    }

    fn lease(&mut self) {
        let req = RequestId::from("r");
        let keys = vec!["k0".to_owned(), "k1".to_owned()];
        let parked = Await {
            req: req.clone(),
            keys: keys.clone(),
            tokens: 2 * CHUNK,
            have_tokens: 0,
            deadline_ms: 60_000,
            written: false,
            ..Await::example()
        };
        let reserve = Reserve {
            req: req.clone(),
            to: target(),
            keys,
            tokens: 2 * CHUNK,
            upto: CHUNK,
            overlap: false,
            ..Reserve::example()
        };
        let computing = Computing {
            req,
            upto: 2 * CHUNK,
            ..Computing::example()
        };
        self.d
            .handle(self.now, receiver::Event::Await(EngineId(2), parked));
        self.p
            .handle(self.now, sender::Event::Reserve(EngineId(1), reserve));
        self.p
            .handle(self.now, sender::Event::Computing(EngineId(1), computing));
        self.settle();
        assert_eq!(self.d.gauges().held, 2);
    }

    /// Breaks the connection, so that both sides notice it.
    fn cut(&mut self) {
        self.connected = false;
        let lost = sender::Event::LinkLost {
            to: target(),
            reason: Reason::PeerLost,
        };
        self.p.handle(self.now, lost);
        self.d
            .handle(self.now, receiver::Event::PeerLost { route: ROUTE });
        self.settle();
        assert_eq!(self.d.gauges().quarantined, 2);
    }
}

#[test]
fn a_lost_link_is_made_anew_for_the_last_word() {
    let mut pair = Pair::new();
    pair.lease();
    pair.cut();
    pair.pass(2 * SECOND);
    assert_eq!(pair.d.gauges().quarantined, 2, "it cannot be heard");
    pair.connected = true;
    pair.pass(2 * SECOND);
    assert_eq!(pair.d.gauges().free, 4, "no further request was needed");
    assert!(pair.p.is_idle() && pair.d.is_idle());
}

#[test]
fn a_receiver_that_stays_away_is_given_up() {
    let mut pair = Pair::new();
    pair.lease();
    pair.cut();
    pair.pass(10 * SECOND);
    assert!(pair.p.is_idle());
    // One link was for the request, the other links were for the last message.
    assert!((2..=8).contains(&pair.links), "{} links", pair.links);
    let links = pair.links;
    pair.pass(60 * SECOND);
    assert_eq!((pair.links, pair.cancels), (links, 0));
}

/// The answer with the lease is lost, so the sender does not know the lease.
#[test]
fn a_grant_that_was_lost_with_the_link_is_given_back() {
    let mut pair = Pair::new();
    pair.deaf = true;
    pair.lease();
    pair.cut();
    pair.pass(SECOND);
    assert_eq!(pair.d.gauges().quarantined, 2, "it cannot be heard");
    (pair.connected, pair.deaf) = (true, false);
    pair.pass(2 * SECOND);
    assert_eq!(pair.d.gauges().free, 4, "no further request was needed");
    assert!(pair.p.is_idle() && pair.d.is_idle());
}

/// As in the test above, but only the sender has noticed that the connection is lost.
#[test]
fn a_grant_that_still_stands_is_closed() {
    let mut pair = Pair::new();
    pair.deaf = true;
    pair.lease();
    pair.deaf = false;
    let lost = sender::Event::LinkLost {
        to: target(),
        reason: Reason::PeerLost,
    };
    pair.p.handle(pair.now, lost);
    pair.settle();
    pair.pass(SECOND);
    assert_eq!((pair.d.gauges().free, pair.cancels), (4, 1));
    assert!(pair.p.is_idle() && pair.d.is_idle());
}

/// Even after more than a thousand leases without dirty slots, the sender must remember a lease
/// with dirty slots.
#[test]
fn dirty_slots_are_not_forgotten_for_clean_ones() {
    let mut pair = Pair::new();
    pair.lease();
    let mut dirty = None;
    let ask = |p: &mut Sender, lease| {
        let unwanted = Unwanted {
            lease: LeaseId(lease),
            epoch: Epoch(2),
            reason: Reason::Quarantined,
            ..Unwanted::example()
        };
        let message = ToSender::Unwanted(unwanted);
        p.handle(
            Time(2),
            sender::Event::Peer {
                to: target(),
                message,
            },
        );
        let mut answer = None;
        while let Some(action) = p.poll_action() {
            if let sender::Action::Send {
                message: ToReceiver::CancelNotif(cancel),
                ..
            } = action
            {
                answer = cancel.x.map(|x| x.dirty);
            }
        }
        answer
    };
    let granted = protocol::local::Staged {
        req: RequestId::from("r"),
        chunks: vec![0],
        gather_us: 0,
        event: None,
        layers: Vec::new(),
        ..protocol::local::Staged::example()
    };
    pair.p
        .handle(pair.now, sender::Event::Staged(EngineId(1), granted));
    while let Some(action) = pair.p.poll_action() {
        if let sender::Action::Write {
            transfer,
            lease,
            pieces,
            ..
        } = action
        {
            let terminal = false;
            pair.p
                .handle(pair.now, sender::Event::Failed { transfer, terminal });
            dirty = Some((lease.0, vec![pieces[0].to.0]));
        }
    }
    let (lease, slots) = dirty.expect("a write was posted");
    // The receiver does not answer. The sender stops its attempts and remembers the lease's dirty
    // slots.
    for _ in 0..200 {
        pair.now = Time(pair.now.0 + 100 * MS);
        pair.p.handle(pair.now, sender::Event::Deadline);
        while pair.p.poll_action().is_some() {}
    }
    assert!(pair.p.is_idle());
    for other in 0..2000 {
        assert_eq!(ask(&mut pair.p, other), Some(Vec::new()));
    }
    assert_eq!(ask(&mut pair.p, lease), Some(slots));
}
