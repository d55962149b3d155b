use super::*;

#[test]
fn charges_are_taken_back() {
    let load = Arc::new(Load::default());
    let now = Instant::now();
    let first = load.charge(100);
    let second = load.charge(20);
    assert_eq!(
        (load.snapshot(now).tokens, load.snapshot(now).legs),
        (120, 2)
    );
    drop(first);
    assert_eq!(
        (load.snapshot(now).tokens, load.snapshot(now).legs),
        (20, 1)
    );
    drop(second);
    assert_eq!((load.snapshot(now).tokens, load.snapshot(now).legs), (0, 0));
}

#[test]
fn who_fails_too_often_pauses_and_is_tried_once() {
    let breaker = Breaker {
        failures: 3,
        pause: Duration::from_secs(10),
        stall: Duration::from_secs(20),
    };
    let load = Load::default();
    let now = Instant::now();
    assert!(!load.failed(now, breaker) && !load.failed(now, breaker));
    assert!(!load.snapshot(now).is_open);
    assert!(load.failed(now, breaker));
    assert!(load.snapshot(now).is_open);
    let later = now + Duration::from_secs(11);
    assert!(!load.snapshot(later).is_open);
    load.chosen(later, breaker);
    assert!(load.snapshot(later).is_open, "one request tries");
    load.succeeded(Duration::from_millis(5));
    assert_eq!(
        load.done(),
        Done {
            answered: 1,
            seconds: 0.005,
            failed: 3
        }
    );
    assert!(!load.snapshot(later).is_open);
    load.chosen(later, breaker);
    assert!(!load.snapshot(later).is_open);
}

#[test]
fn a_stalled_instance_pauses_until_it_shows_a_sign_of_work() {
    let breaker = Breaker {
        failures: 3,
        pause: Duration::from_secs(5),
        stall: Duration::from_secs(20),
    };
    let load = Load::default();
    let now = Instant::now();
    assert_eq!(load.last_heard(), None);
    assert!(load.stalled(now, breaker), "once is enough");
    assert!(load.snapshot(now).is_open);
    assert!(!load.stalled(now, breaker), "said once");
    let later = now + Duration::from_secs(21);
    assert!(!load.snapshot(later).is_open);
    load.chosen(later, breaker);
    let while_it_tries = later + Duration::from_secs(19);
    assert!(
        load.snapshot(while_it_tries).is_open,
        "one request tries at a time"
    );
    load.succeeded(Duration::from_millis(5));
    assert!(!load.snapshot(while_it_tries).is_open);
    assert!(load.last_heard().is_some_and(|at| at >= now));
}

#[test]
fn health_counts_from_its_first_failure() {
    let load = Load::default();
    let now = Instant::now();
    let limit = Duration::from_secs(10);
    let at = |seconds| now + Duration::from_secs(seconds);
    assert!(!load.is_dead(at(100), now, limit));
    load.checked(at(1), Health::Unknown);
    load.checked(at(9), Health::Unknown);
    assert!(!load.is_dead(at(10), now, limit));
    assert!(load.is_dead(at(12), now, limit));
    assert!(!load.is_dead(at(12), at(5), limit), "it worked at 5 s");
    load.checked(at(12), Health::Good);
    assert!(!load.is_dead(at(100), now, limit));
}

#[test]
fn an_engine_that_says_that_it_is_dead_is_not_waited_for() {
    let load = Load::default();
    let now = Instant::now();
    let limit = Duration::from_secs(20);
    let at = |seconds| now + Duration::from_secs(seconds);
    load.checked(at(1), Health::Dead);
    load.checked(at(2), Health::Unknown);
    assert!(
        !load.is_dead(at(2), now, limit),
        "one answer may be an accident"
    );
    assert!(load.is_dead(at(3), now, limit));
    assert!(!load.is_dead(at(3), at(2), limit), "it worked at 2 s");
    load.checked(at(4), Health::Good);
    assert!(!load.is_dead(at(5), now, limit));
}
