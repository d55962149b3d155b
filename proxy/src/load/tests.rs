use super::*;

#[test]
fn charges_are_taken_back() {
    let load = Arc::new(Load::default());
    let now = Instant::now();
    let first = load.charge(100);
    let second = load.charge(20);
    assert_eq!((load.facts(now).tokens, load.facts(now).legs), (120, 2));
    drop(first);
    assert_eq!((load.facts(now).tokens, load.facts(now).legs), (20, 1));
    drop(second);
    assert_eq!((load.facts(now).tokens, load.facts(now).legs), (0, 0));
}

#[test]
fn who_fails_too_often_pauses_and_is_tried_once() {
    let breaker = Breaker {
        failures: 3,
        pause: Duration::from_secs(10),
    };
    let load = Load::default();
    let now = Instant::now();
    assert!(!load.failed(now, breaker) && !load.failed(now, breaker));
    assert!(!load.facts(now).is_open);
    assert!(load.failed(now, breaker));
    assert!(load.facts(now).is_open);
    let later = now + Duration::from_secs(11);
    assert!(!load.facts(later).is_open);
    load.chosen(later, breaker);
    assert!(load.facts(later).is_open, "one request tries");
    load.succeeded(Duration::from_millis(5));
    assert_eq!(
        load.done(),
        Done {
            answered: 1,
            seconds: 0.005,
            failed: 3
        }
    );
    assert!(!load.facts(later).is_open);
    load.chosen(later, breaker);
    assert!(!load.facts(later).is_open);
}
