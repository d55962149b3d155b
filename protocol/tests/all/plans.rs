//! Checks the plan of a request: Python computes the same plans, one group gives the chunks of
//! LMCache's layout, and a layout with groups is refused where it cannot be divided or understood.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use protocol::Layout;
use protocol::codec;
use protocol::groups::Group;
use protocol::layout::{GroupError, MAX_GROUPS, MAX_STATE_CHUNKS};
use protocol::local::ToSidecar;
use protocol::plan::{Chunking, Part};
use serde::Deserialize;

use crate::setup::{group, layout, layout_of};

/// A line of `fixtures/plans.json`.
#[derive(Deserialize)]
struct Line {
    layout: String,
    groups: Vec<(String, u64, u32)>,
    chunk_tokens: u32,
    tokens: u32,
    have: u32,
    slot_bytes: u64,
    token_chunks: u32,
    needs: Vec<u32>,
    wanted: Vec<u32>,
    chunks: Vec<Vec<Entry>>,
}

/// Part of a chunk: group, first token, end, offset, bytes, start.
type Entry = (usize, u32, u32, u64, u64, u64);

#[test]
fn python_computes_the_same_plans() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/plans.json");
    let lines: Vec<Line> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    assert!(lines.len() > 50);
    for line in lines {
        let groups = line.groups.iter();
        let groups = groups.map(|(kind, bytes, size)| group(kind, *bytes, *size));
        let layout = Layout {
            chunk_tokens: line.chunk_tokens,
            ..layout_of(groups.collect())
        };
        assert_eq!(layout.check(), Ok(()));
        let chunking = Chunking::of(&layout);
        let plan = chunking.plan(line.tokens, line.have);
        let what = format!("{}: {} tokens, {}", line.layout, line.tokens, line.have);
        assert_eq!(layout.chunk_bytes(), Some(line.slot_bytes), "{what}");
        assert_eq!(chunking.slot_bytes(), line.slot_bytes, "{what}");
        assert_eq!(plan.token_chunks(), line.token_chunks, "{what}");
        assert_eq!(plan.chunks() as usize, line.chunks.len(), "{what}");
        assert_eq!(plan.wanted(), line.wanted.len(), "{what}");
        for (chunk, parts) in (0..).zip(&line.chunks) {
            let part = |&(group, from, to, offset, bytes, start): &Entry| Part {
                group,
                tokens: (from, to),
                offset,
                bytes,
                start,
            };
            let parts: Vec<Part> = parts.iter().map(part).collect();
            assert_eq!(plan.parts(chunk), parts, "{what}, chunk {chunk}");
            let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
            assert_eq!(plan.size(chunk), bytes, "{what}, chunk {chunk}");
            assert_eq!(plan.is_empty(chunk), !line.wanted.contains(&chunk));
            assert_eq!(plan.needs(chunk), line.needs[chunk as usize], "{what}");
            assert_eq!(plan.is_state(chunk), chunk >= line.token_chunks);
        }
    }
}

/// Returns the tokens of a chunk of a layout without groups, as releases before groups compute them.
fn chunk_span(index: u32, tokens: u32, first_token: u32, chunk_tokens: u32) -> (u32, u32) {
    let from = index.saturating_mul(chunk_tokens);
    let to = from.saturating_add(chunk_tokens).min(tokens);
    (from.max(first_token).min(to), to)
}

proptest! {
    #[test]
    fn one_full_group_gives_the_numbers_of_a_layout_without_groups(
        tokens in 0..5000u32,
        have in 0..5000u32,
        chunk_tokens in 1..600u32,
        layers in 1..8u32,
    ) {
        let plain = Layout { layers, chunk_tokens, ..layout() };
        let bytes = plain.token_bytes().unwrap();
        let grouped = Layout { chunk_tokens, ..layout_of(vec![group("full", bytes, 0)]) };
        prop_assert_eq!(plain.chunk_bytes(), grouped.chunk_bytes());
        for layout in [&plain, &grouped] {
            let chunking = Chunking::of(layout);
            prop_assert_eq!(Some(chunking.slot_bytes()), layout.chunk_bytes());
            let plan = chunking.plan(tokens, have);
            prop_assert_eq!(plan.chunks(), tokens.div_ceil(chunk_tokens));
            for chunk in 0..plan.chunks() {
                let (from, to) = chunk_span(chunk, tokens, have, chunk_tokens);
                prop_assert_eq!(plan.size(chunk), u64::from(to - from) * bytes);
                prop_assert_eq!(plan.is_empty(chunk), from >= to);
                prop_assert_eq!(plan.needs(chunk), to);
                let part = Part { group: 0, tokens: (from, to), offset: 0, bytes: plan.size(chunk), start: 0 };
                let parts = if from < to { vec![part] } else { Vec::new() };
                prop_assert_eq!(plan.parts(chunk), parts);
            }
        }
    }

    /// The machines compute plans with numbers of peers before they check these numbers.
    #[test]
    fn no_number_is_too_large(
        (tokens, have, chunk_tokens, chunk) in any::<(u32, u32, u32, u32)>(),
        kind in "full|window|chunked|state|other",
        bytes in any::<u64>(),
        size in any::<u32>(),
    ) {
        let groups = vec![group(&kind, bytes, size), group("state", u64::MAX, 0)];
        let layout = Layout { chunk_tokens, ..layout_of(groups) };
        let chunking = Chunking::of(&layout);
        let plan = chunking.plan(tokens, have);
        let parts = plan.parts(chunk);
        prop_assert_eq!(plan.is_empty(chunk), parts.is_empty());
        prop_assert!(plan.needs(chunk) <= tokens);
        prop_assert!(layout.check().is_err() || plan.size(chunk) <= chunking.slot_bytes());
    }
}

#[test]
fn malformed_groups_are_refused_with_the_name_of_the_field() {
    let check = |groups: Vec<Group>, chunk_tokens: u32, text: &str| {
        let layout = Layout {
            chunk_tokens,
            ..layout_of(groups)
        };
        let fault = layout.check().err().map(|fault| fault.to_string());
        assert_eq!(fault.as_deref().unwrap_or("none"), text);
    };
    let full = || group("full", 8, 0);
    check(vec![full(), group("window", 4, 6)], 4, "none");
    check(Vec::new(), 0, "none");
    check(
        vec![full(), group("rows", 4, 6)],
        4,
        "groups[1].kind is \"rows\", and not full, window, chunked or state",
    );
    for kind in ["window", "chunked"] {
        check(
            vec![group(kind, 4, 0)],
            4,
            "groups[0].size is 0, and a window or chunked group needs its number of tokens",
        );
    }
    check(
        vec![full(), group("state", 0, 0)],
        4,
        "groups[1].bytes is 0",
    );
    check(vec![full()], 0, "chunk_tokens is 0");
    check(
        vec![full(); MAX_GROUPS + 1],
        4,
        "groups has 65 entries; at most 64 are allowed",
    );
    for groups in [
        vec![group("full", u64::MAX, 0)],
        vec![full(), group("full", u64::MAX, 0)],
        vec![
            full(),
            group("state", u64::MAX, 0),
            group("state", u64::MAX, 0),
        ],
    ] {
        check(
            groups,
            4,
            "groups[].bytes: the sum of all groups exceeds 2^64 bytes in a chunk of 4 tokens",
        );
    }
    let layout = |state| layout_of(vec![group("full", 1, 0), group("state", state, 0)]);
    let most = u64::from(MAX_STATE_CHUNKS * layout(1).chunk_tokens);
    assert_eq!(layout(most).check(), Ok(()));
    let fault = layout(most + 1).check();
    assert!(matches!(fault, Err(GroupError::LargeState { state, .. }) if state == most + 1));
}

fn hello(bytes: &[u8]) -> Layout {
    match codec::decode(bytes) {
        Ok(ToSidecar::Hello(hello)) => hello.layout,
        other => panic!("{other:?}"),
    }
}

const HELLO_GROUPS: &[u8] = include_bytes!("../../fixtures/hello_groups.bin");

#[test]
fn layouts_with_other_groups_differ() {
    let grouped = hello(HELLO_GROUPS);
    assert_eq!(grouped.check(), Ok(()));
    assert_eq!(grouped.groups.len(), 3);
    assert_eq!(grouped.difference(&grouped.clone()), None);
    let mut other = grouped.clone();
    other.groups[1].size = 512;
    let difference = |name, ours: &str, theirs: &str| {
        let (ours, theirs) = (ours.to_owned(), theirs.to_owned());
        Some((name, ours, theirs))
    };
    assert_eq!(
        grouped.difference(&other),
        difference(
            "groups",
            "window of 256 bytes and size 1024 at position 1",
            "window of 256 bytes and size 512 at position 1"
        )
    );
    other.groups.clear();
    assert_eq!(
        grouped.difference(&other),
        difference("groups", "3 groups", "no groups")
    );
}

/// Releases before groups skip the field `groups`, and compare the other fields. To them, a layout
/// with groups must not look like a layout without groups.
#[test]
fn a_release_that_does_not_know_groups_refuses_them() {
    let mut tree = rmpv::decode::read_value(&mut &HELLO_GROUPS[..]).unwrap();
    let rmpv::Value::Map(message) = &mut tree else {
        panic!("a message is a map");
    };
    let layout = message.iter_mut().find(|(key, _)| *key == "layout".into());
    let Some((_, rmpv::Value::Map(fields))) = layout else {
        panic!("the hello has a layout");
    };
    let all = fields.len();
    fields.retain(|(key, _)| *key != "groups".into());
    assert_eq!(fields.len(), all - 1);
    let mut seen = Vec::new();
    rmpv::encode::write_value(&mut seen, &tree).unwrap();
    let seen = hello(&seen);
    // The engine of the earlier release describes the same first layers, without a digest.
    let earlier = Layout {
        quantization: String::new(),
        ..seen.clone()
    };
    let digest = seen.quantization.clone();
    assert!(digest.starts_with("groups:"), "{digest}");
    assert_eq!(
        earlier.difference(&seen),
        Some(("quantization", String::new(), digest))
    );
}
