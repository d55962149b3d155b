use super::*;

const MOST: usize = 1000;

/// Returns a batch with one event, as vLLM encodes it.
fn batch(event: &serde_json::Value) -> Batch {
    let bytes = rmp_serde::to_vec_named(&(1.5, [event], 0)).unwrap();
    Batch::read(&bytes).unwrap()
}

fn stored(hashes: &[u64], parent: Option<u64>, tokens: std::ops::Range<u32>) -> Batch {
    batch(&serde_json::json!({
        "type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent,
        "token_ids": tokens.collect::<Vec<_>>(), "block_size": 4, "lora_id": null, "medium": "GPU",
        "lora_name": null, "group_idx": 0, "kv_cache_spec_kind": "full_attention",
    }))
}

fn removed(hash: u64) -> Batch {
    batch(&serde_json::json!({"type": "BlockRemoved", "block_hashes": [hash], "medium": "GPU"}))
}

fn matches(held: &Held, count: u32) -> u64 {
    let ids: Vec<_> = (0..count).collect();
    held.matches(&Tokens {
        ids: &ids,
        is_whole: true,
        adapter: None,
        salt: None,
    })
}

#[test]
fn blocks_come_and_go() {
    let mut held = Held::default();
    assert!(!held.is_complete());
    assert_eq!(
        held.published(0, &stored(&[7, 8], None, 0..8), MOST),
        Applied::Next
    );
    assert_eq!(
        held.published(1, &stored(&[9], Some(8), 8..12), MOST),
        Applied::Next
    );
    assert!(held.is_complete());
    assert_eq!(matches(&held, 20), 12);
    assert_eq!(matches(&held, 12), 8, "the last token is always computed");
    assert_eq!(matches(&held, 3), 0);
    held.published(2, &removed(8), MOST);
    assert_eq!(
        matches(&held, 20),
        4,
        "a block counts only if all blocks before it are held"
    );
    held.published(3, &stored(&[8], Some(7), 4..8), MOST);
    assert_eq!(matches(&held, 20), 12);
    held.published(
        4,
        &batch(&serde_json::json!({"type": "AllBlocksCleared"})),
        MOST,
    );
    assert_eq!((matches(&held, 20), held.len()), (0, 0));
    assert!(held.is_complete());
    // A kind of a later release, and another medium.
    held.published(
        5,
        &batch(&serde_json::json!({"type": "BlockMoved", "x": [1]})),
        MOST,
    );
    let mut cpu = stored(&[7], None, 0..4);
    cpu.events[0].is_on_gpu = false;
    held.published(6, &cpu, MOST);
    assert_eq!(held.len(), 0);
}

#[test]
fn gaps_and_new_engines() {
    let mut held = Held::default();
    held.published(0, &stored(&[7], None, 0..4), MOST);
    assert_eq!(held.published(2, &removed(7), MOST), Applied::Gap(1));
    assert_eq!(held.published(0, &removed(7), MOST), Applied::Old);
    held.replayed(1, &stored(&[8], Some(7), 4..8), MOST);
    held.replayed(2, &removed(8), MOST);
    assert!(held.is_complete());
    assert_eq!((matches(&held, 20), held.next()), (4, 3));
    // The publisher has dropped batches 3 and 4.
    held.replayed(5, &stored(&[10], Some(9), 8..12), MOST);
    assert!(!held.is_complete());
    assert_eq!((held.len(), held.next()), (0, 6));
    // The engine was started again.
    held.connected();
    assert_eq!(
        held.published(0, &stored(&[3], None, 0..4), MOST),
        Applied::Next
    );
    assert!(held.is_complete());
    assert_eq!(matches(&held, 20), 4);
    held.lose(9);
    assert_eq!(
        held.published(9, &stored(&[4], None, 0..4), MOST),
        Applied::Next
    );
    assert!(!held.is_complete(), "other blocks may be held, too");
    held.forget();
    assert_eq!(held.published(0, &removed(1), MOST), Applied::Next);
}

#[test]
fn adapters_salts_and_images_have_their_own_blocks() {
    let mut held = Held::default();
    let mut of_adapter = stored(&[7], None, 0..4);
    of_adapter.events[0].adapter = Some("lora".into());
    held.published(0, &of_adapter, MOST);
    let event = |keys: serde_json::Value, hash: u64| {
        batch(&serde_json::json!({
            "type": "BlockStored", "block_hashes": [hash], "parent_block_hash": null, "token_ids": [0, 1, 2, 3],
            "block_size": 4, "medium": null, "extra_keys": [keys],
        }))
    };
    held.published(1, &event(serde_json::json!(["salt"]), 8), MOST);
    held.published(2, &event(serde_json::json!([["image", 0]]), 9), MOST);
    assert_eq!(held.len(), 3);
    let ids = [0, 1, 2, 3];
    let check = |adapter, salt, expect| {
        let tokens = Tokens {
            ids: &ids,
            is_whole: false,
            adapter,
            salt,
        };
        assert_eq!(held.matches(&tokens), expect, "{adapter:?} {salt:?}");
    };
    check(Some("lora"), None, 4);
    check(None, Some("salt"), 4);
    check(None, None, 0);
    check(Some("other"), None, 0);
    check(None, Some("image"), 0);
}

#[test]
fn only_one_group_that_keeps_prefixes_counts() {
    let of_group = |kind: &str, group: i64, tokens: std::ops::Range<u32>| {
        let mut batch = stored(&[7, 8], None, tokens);
        batch.events[0].group = Some(group);
        batch.events[0].keeps_prefixes = kind == "full_attention";
        batch
    };
    let gone = |hash: u64, group: i64| {
        batch(&serde_json::json!({
            "type": "BlockRemoved", "block_hashes": [hash], "medium": "GPU", "group_idx": group,
        }))
    };
    let mut held = Held::default();
    // A window forgets the beginning of a prompt, so its blocks say nothing about a prefix.
    held.published(0, &of_group("sliding_window", 0, 0..8), MOST);
    assert_eq!(matches(&held, 20), 0);
    held.published(1, &of_group("full_attention", 1, 0..8), MOST);
    held.published(2, &of_group("full_attention", 2, 0..8), MOST);
    assert_eq!((held.len(), matches(&held, 20)), (2, 8));
    // The groups share the hashes of their blocks.
    held.published(3, &gone(8, 0), MOST);
    held.published(4, &gone(8, 2), MOST);
    assert_eq!(matches(&held, 20), 8);
    held.published(5, &gone(8, 1), MOST);
    assert_eq!(matches(&held, 20), 4);
}

#[test]
fn the_number_of_blocks_is_bounded() {
    let mut held = Held::default();
    for number in 0..50 {
        let first = u32::try_from(number).unwrap() * 100;
        held.published(number, &stored(&[number], None, first..first + 4), 10);
    }
    assert_eq!(held.len(), 10);
    let mut big = stored(&[99], None, 0..4);
    big.events[0].block_tokens = Some(0);
    held.published(50, &big, 10);
    assert_eq!(held.len(), 10);
}

#[test]
fn messages_that_are_no_batch() {
    for bytes in [
        &b""[..],
        b"\xc1",
        b"hello",
        b"\x90",
        b"\x91\x01",
        b"\x92\x01\x91\x80",
        b"\x92\x01\xdd\xff\xff\xff\xff",
    ] {
        assert!(Batch::read(bytes).is_err(), "{bytes:?}");
    }
    let deep = [&[0x92, 1][..], &vec![0x91; 100_000]].concat();
    assert!(Batch::read(&deep).is_err());
    assert!(Batch::read(&[0x91; 100_000]).is_err());
    // The rank is absent if it is the default.
    assert!(Batch::read(b"\x92\x01\x90").is_ok());
}
