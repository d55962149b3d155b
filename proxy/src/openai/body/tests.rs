use super::*;

fn parse(text: &str) -> RequestBody {
    let bytes = Bytes::copy_from_slice(text.as_bytes());
    RequestBody::parse(bytes).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn text(bytes: &Bytes) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn who_gets_a_transfer() {
    let completion = |fields: &str, expect: Option<Fallback>| {
        let body = parse(&format!("{{{fields}}}"));
        assert_eq!(body.fallback(Endpoint::Completions), expect, "{fields}");
    };
    completion(r#""prompt": "one""#, None);
    completion(r#""prompt": """#, None);
    completion(r#""prompt": [1, 2, 3]"#, None);
    completion(r#""prompt":[ -1, 2]"#, None);
    completion(r#""prompt": ["one"]"#, None);
    completion(r#""prompt": [[1, 2]]"#, None);
    completion(r#""prompt": []"#, None);
    completion(r#""prompt": "a", "n": 1, "best_of": 1"#, None);
    completion(r#""prompt": "a", "n": null"#, None);
    completion(r#""prompt": "a", "n": 2"#, None);
    completion(
        r#""prompt": "a", "best_of": 3"#,
        Some(Fallback::ManySequences),
    );
    completion(
        r#""prompt": "a", "use_beam_search": true"#,
        Some(Fallback::ManySequences),
    );
    completion(r#""prompt": "a", "use_beam_search": false"#, None);
    completion(
        r#""prompt": "a", "prompt_logprobs": 0"#,
        Some(Fallback::PromptLogprobs),
    );
    completion(r#""prompt": "a", "echo": true"#, None);
    completion(r#""prompt": "a", "logprobs": 3"#, None);
    completion(
        r#""prompt": "a", "echo": true, "logprobs": 0"#,
        Some(Fallback::PromptLogprobs),
    );
    completion(
        r#""prompt": null, "prompt_embeds": "AAAA""#,
        Some(Fallback::PromptEmbeds),
    );
    completion(r#""prompt": "a", "cache_salt": "s""#, None);
    assert!(parse(r#"{"prompt": "a", "cache_salt": "s"}"#).is_salted());
    assert!(!parse(r#"{"prompt": "a", "cache_salt": null}"#).is_salted());
    completion(
        r#""prompt": "a", "max_tokens": 0"#,
        Some(Fallback::NothingToDecode),
    );

    let echo = parse(r#"{"messages": [], "echo": true}"#);
    let expect = Some(Fallback::PromptLogprobs);
    assert_eq!(echo.fallback(Endpoint::Chat), expect);

    let chat = |messages: &str, expect: Option<Fallback>| {
        let body = parse(&format!(r#"{{"messages": {messages}}}"#));
        assert_eq!(body.fallback(Endpoint::Chat), expect, "{messages}");
    };
    chat(r#"[{"role": "user", "content": "hi"}]"#, None);
    chat(
        r#"[{"role": "assistant", "content": null, "tool_calls": []}]"#,
        None,
    );
    chat(
        r#"[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]"#,
        None,
    );
    chat(
        r#"[{"role": "user", "content": [{"type": "text", "text": "hi \"uuid\""}, {"type": "image_url", "image_url": {"url": "data:,"}}]}]"#,
        None,
    );
    chat(
        r#"[{"content": [{"type": "image_url", "image_url": null, "uuid": "a"}]}]"#,
        Some(Fallback::Multimodal),
    );
    // The engine, not the proxy, refuses malformed values.
    chat(r#""hi""#, None);
    chat(r#"[{"content": [1, 2]}]"#, None);
}

#[test]
fn who_needs_sidecars() {
    let check = |fields: &str, expect: Option<Fallback>| {
        let body = parse(&format!("{{{fields}}}"));
        let endpoint = Endpoint::Completions;
        assert_eq!(body.sidecars_only(endpoint), expect, "{fields}");
        assert_eq!(body.fallback(endpoint), None, "{fields}");
    };
    let sequences = Some(Fallback::ManySequences);
    for (n, expect) in [
        ("2", sequences),
        ("\"2\"", sequences),
        ("1", None),
        ("null", None),
    ] {
        check(&format!(r#""prompt": "a", "n": {n}"#), expect);
    }
    let prompts = Some(Fallback::ManyPrompts);
    for (prompt, expect) in [
        (r#""one""#, None),
        (r#"["one"]"#, None),
        ("[1, 2, 3]", None),
        ("[[1, 2]]", None),
        (r#"["one", "two"]"#, prompts),
        ("[[1, 2], [3]]", prompts),
        (r#""a", "prompt": ["one", "two"], "n": 2"#, prompts),
    ] {
        check(&format!(r#""prompt": {prompt}"#), expect);
    }
}

#[test]
fn media_needs_sidecars() {
    for (content, expect) in [
        (r#""hi""#, None),
        (r#"[{"type": "text", "text": "hi"}]"#, None),
        (
            r#"[{"type": "text"}, {"type": "image_url"}]"#,
            Some(Fallback::Multimodal),
        ),
        (r#"[{"type": "input_audio"}]"#, Some(Fallback::Multimodal)),
    ] {
        let body = parse(&format!(r#"{{"messages": [{{"content": {content}}}]}}"#));
        assert_eq!(body.sidecars_only(Endpoint::Chat), expect, "{content}");
    }
}

#[test]
fn bodies_that_are_refused() {
    let read = |bytes: &[u8]| RequestBody::parse(Bytes::copy_from_slice(bytes));
    let check = |bytes: &[u8], transfer: bool| match read(bytes) {
        Ok(body) => panic!("{body:?}"),
        Err(e) => assert_eq!(matches!(e, BadBody::TransferParams), transfer, "{e}"),
    };
    check(b"", false);
    check(b"null", false);
    check(b"[]", false);
    check(b"{\"a\": 1", false);
    check(b"{\"a\": 1} x", false);
    check(b"{\"a\": \"\xff\"}", false);
    check(b"{1: 2}", false);
    check(
        br#"{"kv_transfer_params": {"do_remote_decode": true}}"#,
        true,
    );
    check(br#"{"kv_transfer_params": {}}"#, true);
    check(
        br#"{"kv_transfer_params": null, "kv_transfer_params": 1}"#,
        true,
    );
    check("{\"a\": NaNa}".as_bytes(), false);
    check(b"\xff\xfe{", false);
    let hidden = r#"{"a": NaN, "\u006bv_transfer_params": {}}"#;
    check(hidden.as_bytes(), true);
    check(&utf16(hidden), true);
    let again = format!("{{{}\"n\":1}}", "\"n\":1,\"x\":1,".repeat(1000));
    check(again.as_bytes(), false);
    // Deep nesting is accepted, because values are not parsed.
    let deep = format!("{{\"a\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(read(deep.as_bytes()).is_ok());
}

/// Returns the text as Windows writes it: little endian, after a byte order mark.
fn utf16(text: &str) -> Vec<u8> {
    let units = std::iter::once(0xfeff).chain(text.encode_utf16());
    units.flat_map(u16::to_le_bytes).collect()
}

#[test]
fn bodies_as_python_reads_them() {
    let read = |bytes: &[u8]| RequestBody::parse(Bytes::copy_from_slice(bytes)).unwrap();
    let given = r#"{"prompt":"hé"}"#;
    let marked = [b"\xef\xbb\xbf", given.as_bytes()].concat();
    let bare = |units: Vec<[u8; 2]>| units.concat();
    let wide: Vec<u8> = given
        .chars()
        .flat_map(|c| u32::from(c).to_be_bytes())
        .collect();
    for body in [
        marked,
        utf16(given),
        bare(given.encode_utf16().map(u16::to_le_bytes).collect()),
        bare(given.encode_utf16().map(u16::to_be_bytes).collect()),
        wide,
    ] {
        assert_eq!(text(&read(&body).local_leg()), given, "{body:?}");
    }
    let given = r#"{"x":[NaN, -Infinity],"temperature":Infinity,"prompt":"\" NaN"}"#;
    let body = read(given.as_bytes());
    assert_eq!(body.json("prompt"), Some(r#""\" NaN""#));
    assert_eq!(text(&body.local_leg()), given);

    let many: Vec<_> = (0..5000).map(|i| format!("\"f{i}\": 1")).collect();
    let many = format!("{{\"n\":1,{},\"stop\":[]}}", many.join(","));
    assert_eq!(text(&read(many.as_bytes()).local_leg()), many);
    let without = read(many.as_bytes()).with(|name| name != "n", &[]);
    assert_eq!(text(&without), many.replace("\"n\":1,", ""));
}

#[test]
fn values_reach_the_engine_as_they_came() {
    let given = r#"{"z":1e400,"a":123456789012345678901234567890,"f":0.10,"s":"\ud83d\ude00 \/","o":{"b":1, "a":2},"z2":1.0}"#;
    assert_eq!(text(&parse(given).local_leg()), given);
    let with_params = parse(given).decode_leg(r#"{"a":[1]}"#);
    let params = r#","kv_transfer_params":{"a":[1]}}"#;
    assert_eq!(
        text(&with_params),
        given.strip_suffix('}').unwrap().to_owned() + params
    );
    let null = parse(r#"{"a":1,"kv_transfer_params":null}"#);
    assert_eq!(text(&null.local_leg()), r#"{"a":1}"#);
}

#[test]
fn prefill_legs() {
    let check = |endpoint, given: &str, expect: &str| {
        let leg = parse(given).prefill_leg(endpoint, Some("{}"), PrefillAnswer::Nothing);
        let with_params = format!(r#"{expect},"kv_transfer_params":{{}}}}"#);
        assert_eq!(text(&leg), with_params, "{given}");
        let leg = parse(given).prefill_leg(endpoint, None, PrefillAnswer::Nothing);
        assert_eq!(text(&leg), format!("{expect}}}"), "{given}");
    };
    check(
        Endpoint::Completions,
        r#"{"prompt":[1,2],"stream":true,"stream_options":{"include_usage":true},"max_tokens":9,"min_tokens":3,"n":1,"logprobs":2,"logprob_token_ids":[5],"echo":true,"seed":1,"of_the_next_version":[1]}"#,
        r#"{"prompt":[1,2],"of_the_next_version":[1],"stream":false,"ignore_eos":true,"max_tokens":1"#,
    );
    check(
        Endpoint::Chat,
        r#"{"messages":[],"max_completion_tokens":9,"top_logprobs":2,"tools":[{}],"temperature":0.0}"#,
        r#"{"messages":[],"tools":[{}],"stream":false,"ignore_eos":true,"max_completion_tokens":1,"max_tokens":1"#,
    );
    check(
        Endpoint::Chat,
        r#"{"messages":[]}"#,
        r#"{"messages":[],"stream":false,"ignore_eos":true,"max_tokens":1"#,
    );
}

#[test]
fn a_first_token_is_chosen_as_the_client_wants_all() {
    let given =
        r#"{"prompt":"a","temperature":0,"top_k":3,"min_tokens":4,"stream":true,"stop":[]}"#;
    let leg = parse(given).prefill_leg(Endpoint::Completions, None, PrefillAnswer::FirstToken);
    let expect = r#"{"prompt":"a","temperature":0,"top_k":3,"stream":false,"return_token_ids":true,"min_tokens":1,"max_tokens":1}"#;
    assert_eq!(text(&leg), expect);
}

#[test]
fn parts_of_a_body() {
    let body = parse(r#"{"n":1,"stop":[2], "seed":null,"n":3,"q\"" : 4 , "r":5 }"#);
    assert_eq!(body.json("n"), Some("3"));
    assert_eq!(body.json("seed"), None);
    assert_eq!(text(&body.only(&["stop", "user"])), r#"{"stop":[2]}"#);
    assert_eq!(text(&body.only(&[])), "{}");
    assert_eq!(
        text(&body.with(|name| name != "stop", &[("n", "0"), ("user", "{}")])),
        r#"{"seed":null,"q\"" : 4 , "r":5,"n":0,"user":{}}"#
    );
}
