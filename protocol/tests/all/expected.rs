//! Kept KV at the receiver, message by message: what it sends to a fetch port, and when it ends a
//! request.

use protocol::keep::{Gone, ToFetcher, ToKeeper};
use protocol::local::{Await, Expect, OfRequest, Target};
use protocol::receiver::{self, Receiver};
use protocol::{EngineId, Epoch, Reason, Time, Token};

use crate::setup::{self, CHUNK, SECOND, keys, target};
use crate::world::keeper;

const ENGINE: EngineId = EngineId(1);

fn token(n: u8) -> Token {
    Token(format!("{n:032x}"))
}

/// A receiver whose engine expects one request.
struct Other {
    machine: Receiver,
    now: Time,
}

impl Other {
    fn new() -> Self {
        Self {
            machine: Receiver::new(setup::receiver(4)),
            now: Time(1),
        }
    }

    fn feed(&mut self, event: receiver::Event) -> Vec<receiver::Action> {
        self.machine.handle(self.now, event);
        std::iter::from_fn(|| self.machine.poll_action()).collect()
    }

    fn wait(&mut self, time: std::time::Duration) -> Vec<receiver::Action> {
        self.now = self.now + time;
        self.feed(receiver::Event::Deadline)
    }

    fn expect(&mut self) -> Vec<receiver::Action> {
        let expect = Expect {
            req: "d1".into(),
            token: token(1),
            from: keeper(),
            epoch: Epoch(1),
            keep_ms: 3000,
        };
        self.feed(receiver::Event::Expect(ENGINE, expect))
    }

    fn park(&mut self) -> Vec<receiver::Action> {
        let parked = Await {
            req: "d1".into(),
            keys: keys("r", 2),
            tokens: 2 * CHUNK,
            have_tokens: 0,
            deadline_ms: 30_000,
            written: false,
        };
        self.feed(receiver::Event::Await(ENGINE, parked))
    }

    fn gone(&mut self, reason: Reason, retry_ms: u32) -> Vec<receiver::Action> {
        let gone = Gone {
            token: token(1),
            req: "d1".into(),
            reason,
            retry_ms,
            ..Gone::example()
        };
        self.feed(receiver::Event::Keeper {
            from: keeper(),
            message: ToFetcher::Gone(gone),
        })
    }
}

/// Returns a word for each action: the message to the fetch port, or the end of the request.
fn words(actions: &[receiver::Action]) -> Vec<String> {
    let word = |action: &receiver::Action| match action {
        receiver::Action::Ask { to, message } => {
            assert_eq!(*to, keeper());
            Some(match message {
                ToKeeper::Fetch(fetch) => {
                    let here: &Target = &fetch.to;
                    assert_eq!(*here, target());
                    "fetch".to_owned()
                }
                ToKeeper::Renew(_) => "renew".to_owned(),
                ToKeeper::Drop(_) => "drop".to_owned(),
            })
        }
        receiver::Action::Ended(_, ended) => ended.reason.map(|reason| reason.to_string()),
        _ => None,
    };
    actions.iter().filter_map(word).collect()
}

#[test]
fn a_receiver_renews_while_the_request_is_queued_and_fetches_when_it_parks() {
    let mut other = Other::new();
    assert_eq!(words(&other.expect()), ["renew"]);
    assert!(words(&other.expect()).is_empty(), "a repetition");
    assert_eq!(words(&other.wait(SECOND)), ["renew"]);
    assert_eq!(words(&other.park()), ["fetch"]);
    assert_eq!(words(&other.wait(SECOND / 2)), ["fetch"]);
    assert!(words(&other.gone(Reason::Duplicate, 200)).is_empty());
    assert_eq!(words(&other.wait(SECOND / 4)), ["fetch"]);
    assert_eq!(words(&other.gone(Reason::Unclaimed, 0)), ["unclaimed"]);
    assert!(other.machine.is_idle());
}

#[test]
fn a_receiver_hears_early_that_the_kv_is_gone() {
    let mut other = Other::new();
    other.expect();
    assert!(words(&other.gone(Reason::EngineGone, 0)).is_empty());
    assert!(words(&other.wait(5 * SECOND)).is_empty());
    assert_eq!(words(&other.park()), ["engine_gone"]);
    assert!(other.machine.is_idle());
}

#[test]
fn a_receiver_drops_what_its_engine_does_not_want() {
    let abort = || receiver::Event::Abort(ENGINE, OfRequest { req: "d1".into() });
    let mut queued = Other::new();
    queued.expect();
    assert_eq!(words(&queued.feed(abort())), ["drop", "unwanted"]);
    assert!(queued.machine.is_idle());

    let mut parked = Other::new();
    parked.expect();
    parked.park();
    assert_eq!(words(&parked.feed(abort())), ["drop", "unwanted"]);
    assert!(parked.machine.is_idle());

    let mut dead = Other::new();
    dead.expect();
    let actions = dead.feed(receiver::Event::EngineGone(ENGINE));
    assert_eq!(words(&actions), ["drop"]);
    assert!(dead.machine.is_idle());

    let mut late = Other::new();
    late.expect();
    late.park();
    assert_eq!(words(&late.wait(5 * SECOND)), ["no_sender", "drop"]);
    assert!(late.machine.is_idle());

    let mut silent = Other::new();
    silent.expect();
    let end = words(&silent.wait(20 * SECOND));
    assert_eq!(end, ["drop"], "the engine never parks the request");
    assert!(silent.machine.is_idle());
}

#[test]
fn a_fetch_port_that_cannot_be_reached_ends_parked_requests_only() {
    let lost = || receiver::Event::KeeperLost {
        from: keeper(),
        reason: Reason::NoLink,
    };
    let mut other = Other::new();
    other.expect();
    assert!(words(&other.feed(lost())).is_empty());
    assert_eq!(words(&other.park()), ["fetch"]);
    assert_eq!(words(&other.feed(lost())), ["no_link"]);
    assert!(other.machine.is_idle());
}

#[test]
fn a_receiver_believes_only_the_keeper_and_the_token_of_the_request() {
    let mut other = Other::new();
    other.expect();
    other.park();
    let gone = |from, token, req: &str| receiver::Event::Keeper {
        from,
        message: ToFetcher::Gone(Gone {
            token,
            req: req.into(),
            reason: Reason::Unclaimed,
            retry_ms: 0,
            ..Gone::example()
        }),
    };
    let mut elsewhere = keeper();
    elsewhere.port += 1;
    for event in [
        gone(elsewhere, token(1), "d1"),
        gone(keeper(), token(2), "d1"),
        gone(keeper(), token(1), "d2"),
    ] {
        assert!(words(&other.feed(event)).is_empty());
    }
    assert_eq!(
        words(&other.feed(gone(keeper(), token(1), "d1"))),
        ["unclaimed"]
    );
}
