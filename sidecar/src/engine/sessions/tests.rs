//! Tests of the division of a buffer into slots.

use protocol::groups::Group;

use super::*;

fn group(kind: &str, bytes: u64, size: u32) -> Group {
    Group {
        kind: kind.to_owned(),
        bytes,
        size,
    }
}

/// Returns a layout with 64 KiB in a chunk of 256 tokens, unless it has groups.
fn layout(groups: Vec<Group>) -> Layout {
    Layout {
        dtype: "bfloat16".to_owned(),
        layers: 2,
        kv_heads: 2,
        head_size: 16,
        mla: false,
        chunk_tokens: 256,
        groups,
        ..Layout::example()
    }
}

fn divide(groups: Vec<Group>, buffer_bytes: u64, max_prefill_tokens: u32) -> Result<u32, String> {
    let limits = Limits {
        buffer_bytes,
        chunk_tokens: Some(256),
        max_prefill_tokens,
    };
    SlotLayout::of(&layout(groups), &limits)
        .map(|slot_layout| slot_layout.slots)
        .map_err(|refused| {
            assert_eq!(refused.reason, Reason::LayoutMismatch);
            refused.text
        })
}

const SLOT: u64 = 64 << 10;

#[test]
fn the_longest_prompt_fits_the_buffer() {
    let check = |slots: u64, tokens, least: Option<u64>| {
        let divided = divide(Vec::new(), slots * SLOT, tokens);
        let Some(least) = least else {
            return assert_eq!(divided.map(u64::from), Ok(slots));
        };
        let text = divided.unwrap_err();
        assert!(text.contains(&format!("to {}", least * SLOT)), "{text}");
    };
    check(2, 0, None);
    check(1, 0, Some(2));
    check(4, 1024, None);
    check(4, 1025, Some(5));
}

#[test]
fn a_state_takes_slots_beside_the_tokens() {
    let hybrid = || vec![group("full", 256, 0), group("state", 3 * SLOT - 1, 0)];
    assert_eq!(divide(hybrid(), 4 * SLOT, 0), Ok(4));
    assert_eq!(divide(hybrid(), 5 * SLOT, 512), Ok(5));
    let text = divide(hybrid(), 3 * SLOT, 0).unwrap_err();
    assert!(
        text.contains("holds 3 chunks (768 tokens)") && text.contains("needs 4"),
        "{text}"
    );
    assert!(divide(hybrid(), 4 * SLOT, 512).is_err());
    // Two requests share the two slots of a state without tokens.
    assert_eq!(divide(vec![group("state", SLOT, 0)], 2 * SLOT, 512), Ok(2));
    // The window covers two chunks of any prompt.
    let window = vec![group("window", 256, 300)];
    assert_eq!(divide(window, 2 * SLOT, 2048), Ok(2));
}

#[test]
fn malformed_groups_are_refused() {
    for (groups, field) in [
        (vec![group("rows", 256, 0)], "groups[0].kind is \"rows\""),
        (vec![group("window", 256, 0)], "groups[0].size is 0"),
        (vec![group("full", 0, 0)], "groups[0].bytes is 0"),
        (vec![group("full", 1, 0); 65], "groups has 65 entries"),
        (vec![group("full", u64::MAX, 0)], "groups[].bytes"),
    ] {
        let text = divide(groups, 1 << 30, 0).unwrap_err();
        assert!(
            text.contains("layout of the engine's KV is malformed") && text.contains(field),
            "{text}"
        );
    }
}
