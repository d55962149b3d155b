use super::*;

fn merger(endpoint: Endpoint) -> Merger {
    let first = FirstToken {
        id: 7,
        text: "He".into(),
        finish_reason: Some("stop".into()),
    };
    Merger::new(endpoint, "r", Some("\"m\""), first)
}

fn events(bytes: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(bytes).unwrap();
    let data = text
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "));
    data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data)))
        .collect()
}

#[test]
fn streams() {
    let given = concat!(
        "data: {\"id\":\"x\",\"choices\":[{\"index\":0,\"text\":\"llo\",\"finish_reason\":\"length\"}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":6,\"completion_tokens\":3}}\n\n",
        "data: [DONE]\n\n",
    );
    for (endpoint, words) in [
        (Endpoint::Completions, vec!["He", "llo"]),
        (Endpoint::Chat, vec!["", "He", "llo"]),
    ] {
        let mut merger = merger(endpoint);
        let mut out = merger.head().to_vec();
        // The result must not depend on where the stream is cut.
        for piece in given.as_bytes().chunks(7) {
            out.extend_from_slice(&merger.chunk(piece));
        }
        let events = events(&out);
        let text = |event: &Value| match endpoint {
            Endpoint::Completions => event["choices"][0]["text"].clone(),
            _ => event["choices"][0]["delta"]["content"].clone(),
        };
        let said: Vec<_> = events[..words.len()].iter().map(text).collect();
        assert_eq!(said, words);
        let [last, usage, done] = &events[words.len() - 1..] else {
            panic!("{events:?}")
        };
        assert_eq!(last["choices"][0]["finish_reason"], "length");
        assert_eq!(last["id"], events[0]["id"]);
        assert_eq!(
            usage["usage"],
            json!({"prompt_tokens": 5, "completion_tokens": 4})
        );
        assert_eq!(*done, "[DONE]");
    }
}

#[test]
fn whole_answers() {
    let given = json!({"id": "x", "choices": [{"index": 0, "text": "llo", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 3}});
    let whole = merger(Endpoint::Chat).whole(&given.to_string().into());
    let whole: Value = serde_json::from_slice(&whole).unwrap();
    assert_eq!(
        whole["choices"][0]["message"],
        json!({"role": "assistant", "content": "Hello"})
    );
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["usage"]["completion_tokens"], 4);
    let head: Value =
        serde_json::from_slice(&merger(Endpoint::Completions).whole_head(Some(5))).unwrap();
    assert_eq!(
        (
            &head["choices"][0]["text"],
            &head["choices"][0]["finish_reason"]
        ),
        (&json!("He"), &json!("stop"))
    );
    assert_eq!(
        merger(Endpoint::Chat).whole(&Bytes::from_static(b"oops")),
        "oops"
    );
    let last = events(&merger(Endpoint::Completions).only_head());
    assert_eq!(last[1]["choices"][0]["finish_reason"], "stop");
}

#[test]
fn a_long_event_is_searched_once() {
    // If each piece started a search from the event's beginning, this test would take half a
    // minute, and a proxy would serve nothing else in this time.
    let mut merger = merger(Endpoint::Completions);
    let begun = std::time::Instant::now();
    for _ in 0..8192 {
        assert!(merger.chunk(&[b'x'; 256]).is_empty());
    }
    assert_eq!(merger.chunk(b"\n\n").len(), 8192 * 256 + 2);
    let took = begun.elapsed();
    assert!(took < std::time::Duration::from_secs(15), "{took:?}");
}
