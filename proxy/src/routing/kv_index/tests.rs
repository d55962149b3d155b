use super::*;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;

fn prompt(text: &str) -> Prompt {
    let body = serde_json::json!({"model": "m", "prompt": text}).to_string();
    Prompt::of(
        &RequestBody::parse(body.into()).unwrap(),
        Endpoint::Completions,
    )
}

fn stored(number: u64, hashes: std::ops::Range<u64>, first: u32) -> Batch {
    let parent = number.checked_sub(1).map(|_| hashes.start - 1);
    let count = u32::try_from(hashes.end - hashes.start).unwrap() * 16;
    let event = serde_json::json!({
        "type": "BlockStored", "block_hashes": hashes.collect::<Vec<_>>(), "parent_block_hash": parent,
        "token_ids": (first..first + count).collect::<Vec<_>>(), "block_size": 16, "medium": "GPU",
    });
    Batch::read(&rmp_serde::to_vec_named(&(1.0, [event])).unwrap()).unwrap()
}

#[test]
fn events_replace_guesses() {
    let index = KvIndex::default();
    let guess = || PrefixMatch {
        held: vec![("e".into(), 7), ("other".into(), 9)],
        ..PrefixMatch::default()
    };
    let long = "x".repeat(4000);
    let ask = |text: &str, ids: Option<&[u32]>| {
        let mut known = guess();
        let asked = Asked {
            ids,
            ..Asked::default()
        };
        let is_whole = index.refine(&mut known, &prompt(text), asked);
        known.held.sort();
        (is_whole, known.held[0].1, known.held[1].1)
    };
    assert_eq!(ask(&long, None), (true, 7, 9), "no engine publishes events");
    let ranks = index.add("e", 2);
    let ids: Vec<u32> = (0..1000).collect();
    assert_eq!(ask(&long, None), (false, 7, 9), "the tokens are not known");
    assert_eq!(
        ask(&long, Some(&ids)),
        (true, 7, 9),
        "the blocks are not known"
    );
    ranks[0].published(0, &stored(0, 1..31, 0));
    assert_eq!(ask(&long, Some(&ids)), (true, 7, 9), "a rank is not known");
    ranks[1].published(0, &stored(0, 1..5, 0));
    assert_eq!(ask(&long, Some(&ids)), (true, 480, 9));
    index.learn(&prompt(&long), &ids);
    assert_eq!(ask(&long, None), (true, 480, 9));
    // Half of the prompt's text holds about half of its tokens.
    let half = format!("{}y", &long[..1000]);
    let (is_whole, held, _) = ask(&half, None);
    assert!(!is_whole && (160..=256).contains(&held), "{held}");
    let mut other: Vec<u32> = (0..240).collect();
    other.push(7777);
    index.learn(&prompt(&half), &other);
    assert_eq!(ask(&format!("{}z", &long[..1000]), None), (false, 240, 9));
    index.forget("e");
    assert_eq!(ask(&long, None), (true, 7, 9));
    index.remove("e");
    assert!(!index.is_used());
}

#[test]
fn the_memory_is_bounded() {
    let index = KvIndex::default();
    let ids = vec![1; MAX_PROMPT_TOKENS];
    for number in 0..40 {
        index.learn(&prompt(&number.to_string()), &ids);
    }
    let prompts = index.lock();
    let all = prompts.young.values().chain(prompts.old.values());
    let of = |known: &Known| match known {
        Known::Whole(ids) => ids.len(),
        Known::Beginning { .. } => 0,
    };
    let tokens: usize = all.map(of).sum();
    assert!(tokens <= 2 * (MAX_TOKENS + MAX_PROMPT_TOKENS), "{tokens}");
    assert!(prompts.young.contains_key(&end(&prompt("39"))));
}
