use super::*;
use protocol::Epoch;
use protocol::registration::InstanceRole;

const EVERY: Duration = Duration::from_secs(5);
const READY: Answer = Answer::Confirmed {
    ready: true,
    reason: String::new(),
};

fn not_ready() -> Answer {
    Answer::Confirmed {
        ready: false,
        reason: "no engine".into(),
    }
}

fn register(id: &str, epoch: u64) -> Register {
    Register {
        id: id.into(),
        epoch: Epoch(epoch),
        role: InstanceRole::Decode,
        http: "http://127.0.0.1:8100".into(),
        admin: "http://127.0.0.1:8200".into(),
        host: "127.0.0.1".into(),
        init_ports: vec![7300],
        alloc_ports: vec![7400],
        ready: true,
        slots: 8,
        free_slots: 8,
        parked_tokens: 0,
        period_ms: 1000,
        ..Register::example()
    }
}

/// A registry with its own clock.
struct World {
    registry: Registry,
    now: Instant,
}

impl World {
    fn new() -> Self {
        Self {
            registry: Registry::new(3, EVERY),
            now: Instant::now(),
        }
    }

    fn after(&mut self, ms: u64) -> &mut Self {
        self.now += Duration::from_millis(ms);
        self
    }

    fn register(&mut self, id: &str, epoch: u64) -> Result<Registered, Refused> {
        self.registry.register(self.now, &register(id, epoch))
    }

    fn due(&mut self) -> Vec<(String, u64)> {
        let calls = self.registry.due(self.now);
        calls
            .into_iter()
            .map(|call| (call.id, call.epoch))
            .collect()
    }

    fn answer(&mut self, id: &str, epoch: u64, answer: Answer) {
        self.registry.called_back(self.now, id, epoch, answer);
    }

    /// Registers an instance and confirms it by call-back.
    fn member(&mut self, id: &str, epoch: u64) {
        self.register(id, epoch).unwrap();
        assert_eq!(self.due(), [(id.to_owned(), epoch)]);
        self.answer(id, epoch, READY);
    }

    /// Returns `id@epoch state` of every instance.
    fn shown(&self) -> Vec<String> {
        let show = |i: &Instance| {
            let state = match &i.standing {
                Standing::Unverified => "unverified",
                Standing::Ready => "ready",
                Standing::NotReady(_) => "not ready",
            };
            format!("{}@{} {state}", i.id, i.epoch)
        };
        self.registry.instances().iter().map(show).collect()
    }
}

#[test]
fn only_a_confirmed_instance_is_ready() {
    let mut w = World::new();
    assert_eq!(w.register("d", 1), Ok(Registered::New));
    assert_eq!(w.shown(), ["d@1 unverified"]);
    assert_eq!(w.due(), [("d".into(), 1)]);
    assert_eq!(w.due(), [], "one call at a time");
    w.answer("d", 1, READY);
    assert_eq!(w.shown(), ["d@1 ready"]);
    assert_eq!(w.register("d", 1), Ok(Registered::Renewed));
    assert_eq!(w.after(2000).due(), []);
    w.register("d", 1).unwrap();
    w.after(2000).register("d", 1).unwrap();
    assert_eq!(w.after(1000).due(), [("d".into(), 1)], "every five seconds");
}

/// A sidecar that has proved a key learns this from the proxy.
#[test]
fn a_registration_is_confirmed_while_call_backs_are_answered() {
    let mut w = World::new();
    w.register("d", 1).unwrap();
    let none = (false, String::new());
    assert_eq!(
        w.registry.confirmation(w.now, "d", 1),
        none,
        "no call-back yet"
    );
    w.due();
    w.answer("d", 1, Answer::Silent("refused".into()));
    let failed = || "the call-back failed: refused".to_owned();
    assert_eq!(w.registry.confirmation(w.now, "d", 1), (false, failed()));
    w.answer("d", 1, not_ready());
    assert_eq!(
        w.registry.confirmation(w.now, "d", 1),
        (true, String::new())
    );
    w.after(5000)
        .answer("d", 1, Answer::Silent("refused".into()));
    assert_eq!(w.registry.confirmation(w.now, "d", 1), (true, failed()));
    w.after(10_000);
    assert_eq!(w.registry.confirmation(w.now, "d", 1), (false, failed()));
    assert!(!w.registry.confirmation(w.now, "d", 2).0, "another epoch");
    w.answer("d", 1, Answer::Stranger);
    let (confirmed, trouble) = w.registry.confirmation(w.now, "d", 1);
    assert!(
        !confirmed && trouble.contains("another id or epoch"),
        "{trouble}"
    );
    assert!(!w.registry.holds("d", 1));
}

#[test]
fn answers() {
    let check = |answer: Answer, expect: &[&str]| {
        let mut w = World::new();
        w.register("d", 1).unwrap();
        w.due();
        w.answer("d", 1, answer.clone());
        assert_eq!(w.shown(), expect, "{answer:?}");
    };
    check(READY, &["d@1 ready"]);
    check(not_ready(), &["d@1 not ready"]);
    check(Answer::Stranger, &[]);
    check(Answer::Silent("refused".into()), &["d@1 unverified"]);
}

#[test]
fn whoever_is_silent_or_not_ready_is_asked_again_soon() {
    for answer in [not_ready(), Answer::Silent("late".into())] {
        let mut w = World::new();
        w.register("d", 1).unwrap();
        w.due();
        w.answer("d", 1, answer);
        assert_eq!(w.due(), []);
        assert_eq!(w.after(1000).due(), [("d".into(), 1)]);
    }
}

#[test]
fn three_missed_periods_mean_gone() {
    let mut w = World::new();
    w.member("d", 1);
    w.after(2999);
    w.registry.expire(w.now);
    assert_eq!(w.shown(), ["d@1 ready"]);
    let deadline = w.registry.next_deadline().unwrap();
    assert_eq!(deadline, w.now + Duration::from_millis(1));
    w.now = deadline;
    assert_eq!(w.registry.expire(w.now).len(), 1);
    assert_eq!(w.shown(), Vec::<String>::new());
    assert_eq!(w.registry.next_deadline(), None);
}

#[test]
fn time_in_which_the_proxy_did_not_run_is_no_missed_period() {
    let mut w = World::new();
    w.member("d", 1);
    w.after(1000).register("d", 1).unwrap();
    // Longer than the lease, and than an answer counts.
    w.after(60_000).registry.slept(Duration::from_secs(60));
    assert!(w.registry.expire(w.now).is_empty());
    assert_eq!(w.shown(), ["d@1 ready"]);
    // Who stays silent then is gone after the rest of its lease.
    w.after(2999);
    assert!(w.registry.expire(w.now).is_empty());
    w.after(1);
    assert_eq!(w.registry.expire(w.now).len(), 1);
}

#[test]
fn a_ready_that_is_not_repeated_ends() {
    let mut w = World::new();
    w.member("d", 1);
    for second in 1..=15 {
        assert_eq!(w.shown(), ["d@1 ready"], "after {second} s");
        w.after(1000).register("d", 1).unwrap();
        for (id, epoch) in w.due() {
            w.answer(&id, epoch, Answer::Silent("late".into()));
        }
        w.registry.expire(w.now);
    }
    assert_eq!(w.shown(), ["d@1 not ready"]);
    w.after(1000).register("d", 1).unwrap();
    assert_eq!(w.due(), [("d".into(), 1)]);
    w.answer("d", 1, READY);
    assert_eq!(w.shown(), ["d@1 ready"]);
}

#[test]
fn a_new_epoch_replaces_once_it_is_confirmed() {
    let mut w = World::new();
    w.member("d", 1);
    assert_eq!(w.after(10).register("d", 2), Ok(Registered::New));
    assert_eq!(w.shown(), ["d@1 ready", "d@2 unverified"]);
    assert_eq!(w.due(), [("d".into(), 2)]);
    w.answer("d", 2, READY);
    assert_eq!(w.shown(), ["d@2 ready"]);
    w.answer("d", 1, READY);
    assert_eq!(w.shown(), ["d@2 ready"], "a late answer of the old one");
}

#[test]
fn a_forged_epoch_changes_nothing() {
    let mut w = World::new();
    w.member("d", 1);
    w.register("d", 666).unwrap();
    w.due();
    w.answer("d", 666, Answer::Stranger);
    assert_eq!(w.shown(), ["d@1 ready"]);
    assert_eq!(w.registry.leave(w.now, "d", 666).map(|i| i.id), None);
    assert_eq!(w.shown(), ["d@1 ready"]);
}

#[test]
fn a_good_bye_is_taken_at_once() {
    let mut w = World::new();
    w.member("d", 1);
    assert_eq!(w.registry.leave(w.now, "x", 1).map(|i| i.id), None);
    assert_eq!(
        w.registry.leave(w.now, "d", 1).map(|i| i.id),
        Some("d".into())
    );
    assert_eq!(w.shown(), Vec::<String>::new());
    w.answer("d", 1, READY);
    assert_eq!(
        w.shown(),
        Vec::<String>::new(),
        "an answer after the good-bye"
    );
}

#[test]
fn a_change_of_its_own_readiness_is_verified_at_once() {
    let mut w = World::new();
    w.member("d", 1);
    let mut message = register("d", 1);
    message.ready = false;
    message.parked_tokens = 99;
    w.after(100);
    w.registry.register(w.now, &message).unwrap();
    assert_eq!(w.registry.instances()[0].parked_tokens, 99);
    assert_eq!(w.due(), [("d".into(), 1)]);
    w.answer("d", 1, not_ready());
    assert_eq!(w.shown(), ["d@1 not ready"]);
}

#[test]
fn a_suspect_is_called_back_at_once_but_not_for_every_request() {
    let mut w = World::new();
    w.member("d", 1);
    w.registry.suspect(w.now, "d");
    assert_eq!(w.due(), [], "it has just answered");
    w.after(2000);
    w.registry.suspect(w.now, "d");
    assert_eq!(w.due(), [("d".into(), 1)]);
}

#[test]
fn registrations_that_are_refused() {
    let mut w = World::new();
    w.member("d", 1);
    let mut check = |change: fn(&mut Register), word: &str| {
        let mut message = register("e", 1);
        change(&mut message);
        let error = w
            .registry
            .register(w.now, &message)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{error}");
    };
    check(|m| m.id.clear(), "id");
    check(|m| m.id = "x".repeat(129), "id");
    check(|m| m.id = "a\nb".into(), "id");
    check(|m| m.http = "ftp://x".into(), "http \"ftp://x\"");
    check(|m| m.admin.clear(), "admin");
    check(|m| m.host.clear(), "host");
    check(|m| m.host = "a b".into(), "host");
    check(|m| m.init_ports.clear(), "0 init ports and 1 alloc ports");
    check(
        |m| (m.init_ports, m.alloc_ports) = (vec![], vec![]),
        "0 init ports",
    );
    check(
        |m| (m.init_ports, m.alloc_ports) = (vec![1; 65], vec![1; 65]),
        "65 init ports",
    );
    check(
        |m| (m.id, m.http) = ("d".into(), "http://elsewhere:1".into()),
        "within one epoch",
    );
    assert_eq!(w.shown(), ["d@1 ready"]);

    w.register("e", 1).unwrap();
    w.register("f", 1).unwrap();
    assert_eq!(w.register("g", 1), Err(Refused::Full(3)));
    assert_eq!(
        w.register("d", 1),
        Ok(Registered::Renewed),
        "known ones may go on"
    );
}

#[test]
fn periods_are_bounded() {
    let check = |period_ms: u32, gone_after_ms: u64| {
        let mut w = World::new();
        let mut message = register("d", 1);
        message.period_ms = period_ms;
        w.registry.register(w.now, &message).unwrap();
        w.after(gone_after_ms - 1);
        w.registry.expire(w.now);
        assert_eq!(w.shown().len(), 1, "{period_ms}");
        w.after(1);
        w.registry.expire(w.now);
        assert_eq!(w.shown().len(), 0, "{period_ms}");
    };
    check(0, 300);
    check(1000, 3000);
    check(u32::MAX, 180_000);
}
