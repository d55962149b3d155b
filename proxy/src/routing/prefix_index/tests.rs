use bytes::Bytes;

use super::*;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;

fn chat(contents: &[&str]) -> Prompt {
    let messages: Vec<_> = contents
        .iter()
        .map(|text| serde_json::json!({"role": "user", "content": text}))
        .collect();
    let body = serde_json::json!({"model": "m", "messages": messages}).to_string();
    Prompt::of(
        &RequestBody::parse(Bytes::from(body)).unwrap(),
        Endpoint::Chat,
    )
}

fn turn(memory: &PrefixIndex, prompt: &Prompt, decode: &str) {
    let known = memory.recall(prompt, None).conversation.map(|(key, _)| key);
    memory.turn(Instant::now(), prompt, None, known, decode);
    memory.learn(prompt, [decode]);
}

fn follows(memory: &PrefixIndex, prompt: &Prompt) -> Option<(String, u32)> {
    let (_, conversation) = memory.recall(prompt, None).conversation?;
    Some((conversation.decode, conversation.turns))
}

#[test]
fn a_later_turn_is_known_by_its_beginning() {
    let memory = PrefixIndex::default();
    let system = "You are a helpful assistant that answers in few words. ".repeat(3);
    let first = chat(&[&system, "hi"]);
    assert_eq!(follows(&memory, &first), None);
    turn(&memory, &first, "d1");
    let second = chat(&[&system, "hi", "hello", "how are you?"]);
    assert_eq!(follows(&memory, &second), Some(("d1".into(), 1)));
    turn(&memory, &second, "d2");
    let third = chat(&[&system, "hi", "hello", "how are you?", "fine", "good"]);
    assert_eq!(follows(&memory, &third), Some(("d2".into(), 2)));
    assert_eq!(memory.conversations(Instant::now()).len(), 1);
    // Two requests with the same system prompt are not one conversation, even if the question is short.
    assert_eq!(follows(&memory, &chat(&[&system, "ho"])), None);
    assert_eq!(follows(&memory, &chat(&["hi"])), None);
    assert_eq!(memory.clear(), 1);
    assert_eq!(follows(&memory, &third), None);
}

#[test]
fn short_prompts_have_conversations_too() {
    let memory = PrefixIndex::default();
    turn(&memory, &chat(&["hi"]), "d1");
    let second = chat(&["hi", "hello", "more"]);
    assert_eq!(follows(&memory, &second), Some(("d1".into(), 1)));
    assert_eq!(follows(&memory, &chat(&["high"])), None);
}

#[test]
fn sessions_are_conversations_whatever_they_say() {
    let memory = PrefixIndex::default();
    memory.turn(Instant::now(), &chat(&["a"]), Some(7), None, "d1");
    let known = memory.recall(&chat(&["b"]), Some(7));
    assert_eq!(known.conversation.unwrap().1.decode, "d1");
    assert_eq!(memory.recall(&chat(&["b"]), Some(8)).conversation, None);
}

#[test]
fn the_longest_prefix_of_each_instance_counts() {
    let memory = PrefixIndex::default();
    let long = "word ".repeat(1000);
    memory.learn(&chat(&[&long[..2000]]), ["d1"]);
    memory.learn(&chat(&[&long]), ["d2"]);
    memory.learn(
        &chat(&["something else entirely, and long enough to count as well, twice over"]),
        ["d3"],
    );
    let mut held = memory.recall(&chat(&[&long, "and on"]), None).held;
    held.sort();
    let names: Vec<_> = held.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["d1", "d2"]);
    assert!((400..=512).contains(&held[0].1), "{held:?}");
    assert!((1100..=1280).contains(&held[1].1), "{held:?}");
}

#[test]
fn what_is_not_asked_for_is_forgotten() {
    let mut recent = Recent::new(4);
    for i in 0..20 {
        *recent.entry(i) = i;
        assert!(recent.get(&0).is_some(), "it is asked for all the time");
        assert!(recent.len() <= 8);
    }
    assert_eq!(recent.get(&3), None);
    assert_eq!(recent.get(&19), Some(&19));
}

#[test]
fn who_is_gone_holds_nothing() {
    let memory = PrefixIndex::default();
    let prompt = chat(&[&"word ".repeat(400)]);
    turn(&memory, &prompt, "d1");
    memory.learn(&prompt, ["d2"]);
    let holders = || {
        let held = memory.recall(&prompt, None).held;
        let mut names: Vec<_> = held.into_iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        names
    };
    assert_eq!(holders(), ["d1", "d2"]);
    memory.forget("d1");
    assert_eq!(holders(), ["d2"]);
    assert_eq!(follows(&memory, &prompt), None);
}
