//! Tests kept KV at the sender, message by message: its answer to each message on its fetch port.

use protocol::keep::{Fetch, OfToken, ToFetcher, ToKeeper};
use protocol::local::{Computing, Keep, OfRequest};
use protocol::message::{AllocResponse, AllocResponseX, ToReceiver, ToSender};
use protocol::sender::{self, FetcherId, Sender};
use protocol::{EngineId, Epoch, Reason, Time, Token};

use crate::setup::{self, CHUNK, SECOND, keys, target};

const ENGINE: EngineId = EngineId(1);
const FETCHER: FetcherId = FetcherId(7);

fn token(n: u8) -> Token {
    Token(format!("{n:032x}"))
}

fn of_token(n: u8, req: &str) -> OfToken {
    OfToken {
        token: token(n),
        epoch: Epoch(1),
        req: req.into(),
        ..OfToken::example()
    }
}

fn fetch(n: u8, req: &str) -> ToKeeper {
    ToKeeper::Fetch(Fetch {
        token: token(n),
        epoch: Epoch(1),
        req: req.into(),
        to: target(),
        ..Fetch::example()
    })
}

/// A sender whose engine keeps requests of two chunks.
struct Side {
    machine: Sender,
    now: Time,
}

impl Side {
    fn new() -> Self {
        Self {
            machine: Sender::new(setup::sender(4)),
            now: Time(1),
        }
    }

    fn feed(&mut self, event: sender::Event) -> Vec<sender::Action> {
        self.machine.handle(self.now, event);
        std::iter::from_fn(|| self.machine.poll_action()).collect()
    }

    fn keep(&mut self, n: u8) -> Vec<sender::Action> {
        let keep = Keep {
            req: format!("p{n}").as_str().into(),
            token: token(n),
            keys: keys("r", 2),
            tokens: 2 * CHUNK,
            upto: 2 * CHUNK,
            keep_ms: 4000,
        };
        self.feed(sender::Event::Keep(ENGINE, keep))
    }

    fn hears(&mut self, message: ToKeeper) -> Vec<sender::Action> {
        let from = FETCHER;
        self.feed(sender::Event::Fetcher { from, message })
    }

    fn wait(&mut self, time: std::time::Duration) -> Vec<sender::Action> {
        self.now = self.now + time;
        self.feed(sender::Event::Deadline)
    }

    fn linked(&mut self) -> Vec<sender::Action> {
        self.feed(sender::Event::Linked {
            to: target(),
            epoch: Epoch(2),
            v: 1,
            slots: 8,
            transport: "tcp".into(),
            cancels: false,
        })
    }
}

fn gone(actions: &[sender::Action]) -> Vec<(Reason, u32)> {
    let of = |action: &sender::Action| match action {
        sender::Action::Answer {
            to,
            message: ToFetcher::Gone(gone),
        } => {
            assert_eq!(*to, FETCHER);
            Some((gone.reason, gone.retry_ms))
        }
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

fn ended(actions: &[sender::Action]) -> Vec<Option<Reason>> {
    let of = |action: &sender::Action| match action {
        sender::Action::Ended(_, ended) => Some(ended.reason),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

/// Otherwise any process could use the fetch port to make the sidecar connect to any address.
#[test]
fn an_unknown_token_contacts_no_address_and_leaves_no_state() {
    let mut side = Side::new();
    side.keep(1);
    for n in 2..100 {
        for message in [
            fetch(n, "d"),
            ToKeeper::Renew(of_token(n, "d")),
            ToKeeper::Drop(of_token(n, "d")),
        ] {
            let is_drop = matches!(message, ToKeeper::Drop(_));
            let actions = side.hears(message);
            let expected = if is_drop { 0 } else { 1 };
            assert_eq!(actions.len(), expected, "{actions:?}");
            assert_eq!(gone(&actions).len(), expected);
            assert!(gone(&actions).iter().all(|g| *g == (Reason::NotKept, 0)));
        }
    }
    assert_eq!(side.machine.gauges().requests, 0);
    assert_eq!(side.machine.gauges().kept, 1);
}

#[test]
fn a_token_of_an_earlier_start_is_stale_and_of_another_version_refused() {
    let mut side = Side::new();
    side.keep(1);
    let old = OfToken {
        epoch: Epoch(9),
        ..of_token(1, "d")
    };
    assert_eq!(
        gone(&side.hears(ToKeeper::Renew(old))),
        [(Reason::StaleEpoch, 0)]
    );
    let newer = OfToken {
        v: 2,
        ..of_token(1, "d")
    };
    assert_eq!(
        gone(&side.hears(ToKeeper::Renew(newer))),
        [(Reason::VersionMismatch, 0)]
    );
    // A decode side that does not know the epoch sends 0.
    let any = OfToken {
        epoch: Epoch(0),
        ..of_token(1, "d")
    };
    assert!(side.hears(ToKeeper::Renew(any)).is_empty());
}

#[test]
fn kept_kv_ends_when_nobody_renews_and_at_the_limit_in_any_case() {
    let mut side = Side::new();
    side.keep(1);
    assert!(ended(&side.wait(SECOND * 39 / 10)).is_empty());
    side.hears(ToKeeper::Renew(of_token(1, "d")));
    assert!(ended(&side.wait(SECOND * 39 / 10)).is_empty());
    assert_eq!(ended(&side.wait(SECOND)), [Some(Reason::Unclaimed)]);
    assert_eq!(gone(&side.hears(fetch(1, "d"))), [(Reason::Unclaimed, 0)]);

    side.keep(2);
    let mut ends = Vec::new();
    for _ in 0..25 {
        ends.extend(ended(&side.wait(SECOND)));
        side.hears(ToKeeper::Renew(of_token(2, "d")));
    }
    assert_eq!(ends, [Some(Reason::Deadline)]);
    assert!(side.machine.is_idle());
}

/// A preempted prefill request may make no progress for a long time. Its KV must not expire
/// meanwhile.
#[test]
fn the_time_begins_when_the_prompt_is_computed() {
    let mut side = Side::new();
    let keep = Keep {
        req: "p1".into(),
        token: token(1),
        keys: keys("r", 2),
        tokens: 2 * CHUNK,
        upto: CHUNK,
        keep_ms: 4000,
    };
    side.feed(sender::Event::Keep(ENGINE, keep));
    assert!(ended(&side.wait(15 * SECOND)).is_empty());
    let computing = Computing {
        req: "p1".into(),
        upto: 2 * CHUNK,
    };
    side.feed(sender::Event::Computing(ENGINE, computing));
    assert!(ended(&side.wait(SECOND * 39 / 10)).is_empty());
    assert_eq!(ended(&side.wait(SECOND)), [Some(Reason::Unclaimed)]);
}

#[test]
fn a_fetch_becomes_a_request_with_the_decode_sides_id() {
    let mut side = Side::new();
    side.keep(1);
    let actions = side.hears(fetch(1, "d1"));
    assert_eq!(actions, [sender::Action::Link { to: target() }]);
    let actions = side.linked();
    let [sender::Action::Send { message, .. }] = &actions[..] else {
        panic!("one question and no word to a proxy: {actions:?}");
    };
    let ToReceiver::AllocRequest(asked) = message else {
        panic!("{message:?}");
    };
    assert_eq!(asked.req_id, "d1");
    assert_eq!(asked.keys, keys("r", 2));
    assert!(side.hears(fetch(1, "d1")).is_empty(), "a repetition");
    let again = gone(&side.hears(fetch(1, "d2")));
    assert!(matches!(again[..], [(Reason::Duplicate, 1..)]), "{again:?}");
}

/// The engine gets no message about a fetch before the fetch has a lease. So another decode side
/// can fetch the KV.
#[test]
fn a_fetch_that_fails_before_its_lease_leaves_the_kv_for_another() {
    let mut side = Side::new();
    side.keep(1);
    side.hears(fetch(1, "d1"));
    let (to, reason) = (target(), Reason::NoLink);
    let actions = side.feed(sender::Event::LinkLost { to, reason });
    assert_eq!(gone(&actions), [(Reason::NoLink, 0)]);
    assert!(ended(&actions).is_empty(), "{actions:?}");
    assert_eq!(side.machine.gauges().kept, 1);

    side.hears(fetch(1, "d2"));
    let seq = side
        .linked()
        .into_iter()
        .find_map(|action| match action {
            sender::Action::Send {
                message: ToReceiver::AllocRequest(asked),
                ..
            } => Some((asked.req_id, asked.x?.seq)),
            _ => None,
        })
        .expect("a question");
    assert_eq!(seq.0, "d2");
    let refusal = AllocResponse {
        remote_indexes: vec![-1, -1],
        already_sent_indexes: Vec::new(),
        x: Some(AllocResponseX {
            seq: seq.1,
            epoch: Epoch(2),
            lease: None,
            have_tokens: 0,
            window: 0,
            reason: Some(Reason::KeyMismatch),
            retry_ms: 0,
            ..AllocResponseX::example()
        }),
    };
    let message = ToSender::AllocResponse(refusal);
    let actions = side.feed(sender::Event::Peer {
        to: target(),
        message,
    });
    // Every other receiver of this model computes the same keys, so another fetch would fail, too.
    assert_eq!(ended(&actions), [Some(Reason::KeyMismatch)]);
    assert!(side.machine.is_idle());
}

#[test]
fn a_drop_ends_kept_kv_unless_another_request_waits_for_it() {
    let mut side = Side::new();
    side.keep(1);
    side.hears(ToKeeper::Renew(of_token(1, "d1")));
    side.hears(ToKeeper::Renew(of_token(1, "d2")));
    assert!(ended(&side.hears(ToKeeper::Drop(of_token(1, "d1")))).is_empty());
    let ends = ended(&side.hears(ToKeeper::Drop(of_token(1, "d2"))));
    assert_eq!(ends, [Some(Reason::Unwanted)]);

    side.keep(2);
    side.hears(fetch(2, "d1"));
    assert!(side.hears(ToKeeper::Drop(of_token(2, "d2"))).is_empty());
    let ends = ended(&side.hears(ToKeeper::Drop(of_token(2, "d1"))));
    assert_eq!(ends, [Some(Reason::Unwanted)]);
    assert!(side.machine.is_idle());
}

#[test]
fn the_engines_end_and_cancel_end_its_kept_kv() {
    let mut side = Side::new();
    side.keep(1);
    side.keep(2);
    let req = OfRequest { req: "p1".into() };
    let actions = side.feed(sender::Event::Cancel(ENGINE, req));
    assert_eq!(ended(&actions), [Some(Reason::Cancelled)]);
    side.feed(sender::Event::EngineGone(ENGINE));
    assert!(side.machine.is_idle());
    assert_eq!(gone(&side.hears(fetch(1, "d"))), [(Reason::Cancelled, 0)]);
    let renew = ToKeeper::Renew(of_token(2, "d"));
    assert_eq!(gone(&side.hears(renew)), [(Reason::EngineGone, 0)]);
}

#[test]
fn what_cannot_be_kept_ends_at_once() {
    let mut side = Side::new();
    assert!(side.keep(1).is_empty());
    // A second `Keep` of the same request extends the time. A `Keep` of another request with the
    // same token is refused.
    assert!(side.keep(1).is_empty());
    let stolen = Keep {
        req: "p9".into(),
        token: token(1),
        keys: keys("r", 2),
        tokens: 2 * CHUNK,
        upto: 2 * CHUNK,
        keep_ms: 4000,
    };
    let unsound = Keep {
        token: Token("0123".into()),
        ..stolen.clone()
    };
    let actions = side.feed(sender::Event::Keep(ENGINE, stolen));
    assert_eq!(ended(&actions), [Some(Reason::Duplicate)]);
    let actions = side.feed(sender::Event::Keep(ENGINE, unsound));
    assert_eq!(ended(&actions), [Some(Reason::BadRequest)]);
    side.feed(sender::Event::Drain);
    assert_eq!(ended(&side.keep(2)), [Some(Reason::Draining)]);
    assert_eq!(gone(&side.hears(fetch(2, "d"))), [(Reason::Draining, 0)]);
    assert_eq!(side.machine.gauges().kept, 1, "a drain leaves what is kept");
}
