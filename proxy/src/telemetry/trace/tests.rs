use super::*;

const SENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

#[test]
fn contexts() {
    let check = |text: &str, ok: bool| assert_eq!(parse(text).is_some(), ok, "{text}");
    check(SENT, true);
    check(
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        true,
    );
    check(
        "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        true,
    );
    check(
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        false,
    );
    check(
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        false,
    );
    check(
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        false,
    );
    check(
        "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        false,
    );
    check("00-0af7-b7ad-01", false);
    check("", false);
    let mut headers = HeaderMap::new();
    headers.insert(HEADER, HeaderValue::from_static(SENT));
    let trace = Trace::of(&headers);
    assert!(trace.is_sampled);
    trace.pass_on(&mut headers);
    let passed = headers[HEADER].to_str().unwrap();
    assert_eq!(&passed[..36], &SENT[..36]);
    assert_ne!(
        &passed[36..52],
        &SENT[36..52],
        "the legs are children of ours"
    );
    assert_eq!(Trace::of(&HeaderMap::new()).parent, None);
}

#[test]
fn spans() {
    let mut headers = HeaderMap::new();
    headers.insert(HEADER, HeaderValue::from_static(SENT));
    let trace = Trace::of(&headers);
    let record = Record {
        arrived_unix_ms: 1000,
        endpoint: "chat",
        prefill: Some("p".into()),
        decode: Some("d".into()),
        prefill_ms: Some(2.5),
        decode_sent_ms: Some(1.0),
        total_ms: 10.0,
        outcome: "failed",
        prompt_tokens: Some(7),
        ..Record::default()
    };
    let spans = trace.spans(&record);
    let times = |span: &Value| {
        (
            span["startTimeUnixNano"].clone(),
            span["endTimeUnixNano"].clone(),
        )
    };
    assert_eq!(spans.len(), 3);
    assert_eq!(times(&spans[0]), (json!("1000000000"), json!("1010000000")));
    assert_eq!(times(&spans[1]), (json!("1000000000"), json!("1002500000")));
    assert_eq!(times(&spans[2]), (json!("1001000000"), json!("1010000000")));
    assert_eq!(spans[0]["parentSpanId"], "b7ad6b7169203331");
    assert_eq!(spans[1]["parentSpanId"], spans[0]["spanId"]);
    assert_eq!(spans[0]["status"]["code"], 2);
    let known = spans[0]["attributes"].as_array().unwrap();
    assert!(known.contains(&json!({"key": "prompt_tokens", "value": {"intValue": "7"}})));
    assert!(
        known.iter().all(|attribute| attribute["key"] != "alone"),
        "null is not said"
    );
}
