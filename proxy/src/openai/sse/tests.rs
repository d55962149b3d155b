use super::*;

#[test]
fn only_data_is_a_sign_of_work() {
    let check = |stream: &str, expect: bool| {
        for size in 1..=stream.len() {
            let mut events = Events::default();
            let mut heard = false;
            for piece in stream.as_bytes().chunks(size) {
                heard |= events.hear(piece);
            }
            assert_eq!(heard, expect, "{stream:?} in pieces of {size}");
            assert_eq!(events.unended(), 0, "{stream:?} in pieces of {size}");
        }
    };
    check(": keep-alive\n\n", false);
    check(": data: x\n\n", false);
    check("event: ping\n\ndat\n\n", false);
    check("data: x\n\n", true);
    check(": c\n\ndata: x\n\n: c\n\n", true);
    check(": c\r\n\r\n", false);
    check("data: x\r\n\r\ndata: y\r\n\r\n", true);
    let mut events = Events::default();
    events.hear(b"data: x\n\ndata: 12345");
    assert_eq!(events.unended(), "data: 12345".len());
    events.hear(b"\n67");
    assert_eq!(events.unended(), "data: 12345\n67".len());
}

#[test]
fn the_first_event_comes_without_what_is_before_it() {
    let check = |stream: &str, expect: Option<&str>| {
        for size in 1..=stream.len() {
            let mut first = First::default();
            let mut pieces = stream.as_bytes().chunks(size);
            let got = pieces.find_map(|piece| first.take(piece));
            let got = got.map(|bytes| String::from_utf8(bytes).unwrap());
            let begins = match (&got, expect) {
                (Some(got), Some(expect)) => got.starts_with(expect),
                (None, None) => true,
                _ => false,
            };
            assert!(begins, "{stream:?} in pieces of {size}: {got:?}");
        }
    };
    check("data: x\n\n", Some("data: x\n\n"));
    check(": c\n\n: c\n\ndata: x\n\ndata: y\n\n", Some("data: x\n\n"));
    check(
        "event: e\n\nevent: f\ndata: x\n\n",
        Some("event: f\ndata: x\n\n"),
    );
    check(
        ": c\r\n\r\ndata: x\r\n\r\ndata: y\r\n\r\n",
        Some("data: x\r\n\r\n"),
    );
    check("event: e\r\n\r\ndata: x\r\n\r\n", Some("data: x"));
    check(": c\n\ndata: x\n", None);
    check(": c\r\n\r\ndata: x\r\n\r", None);
    check(": c\n\n", None);
    let mut first = First::default();
    for _ in 0..1000 {
        assert_eq!(first.take(&[b':'; 1000]), None);
    }
    assert!(first.held.len() < 10, "comments are not kept");
    let mut first = First::default();
    let long = [b"data: ", &[b'x'; MAX_FIRST_BYTES][..]].concat();
    assert_eq!(first.take(&long), Some(long.clone()));
}

#[test]
fn errors_in_the_place_of_events() {
    let failed = b"data: {\"error\": {\"message\": \"EngineCore\", \"code\": 500}}\n\n";
    assert!(error(failed).is_some());
    assert!(error(b"data: {\"choices\": [{\"text\": \"{\\\"error\\\"\"}]}\n\n").is_none());
    assert!(error(b": {\"error\": 1}\n\n").is_none());
    assert!(ends_with_error(
        &[&failed[..], b"data: [DONE]\n\n"].concat()
    ));
    assert!(ends_with_error(failed));
    assert!(!ends_with_error(
        b"data: {\"choices\": []}\n\ndata: [DONE]\n\n"
    ));
    assert!(!ends_with_error(
        &[&failed[..], b"data: {\"choices\": []}\n\n"].concat()
    ));
}
