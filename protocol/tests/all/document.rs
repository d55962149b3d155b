//! Checks that the documents agree with the protocol's types: PROTOCOL.md has the version and the names of
//! the messages, docs/reference/reasons.md has the reasons, and docs/sizing.md has the size of a chunk.
//! `field_tables` checks the tables of PROTOCOL.md.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use protocol::codec::Message;
use protocol::keep::{ToFetcher, ToKeeper};
use protocol::local::{ToEngine, ToSidecar};
use protocol::message::{Init, Query, ToReceiver, ToSender};
use protocol::registration::{FromProxy, ToProxy};
use protocol::{Layout, Reason};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document() -> String {
    fs::read_to_string(root().join("PROTOCOL.md")).unwrap()
}

/// Returns the table below a heading of a document: the trimmed cells of each row, without the
/// header.
fn table(document: &str, heading: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join(document)).unwrap();
    let section = text
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("{document} has no {heading:?}"))
        .1;
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().skip_while(|line| !line.starts_with('|'));
    rows.take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|row| {
            row.trim_matches('|')
                .split('|')
                .map(|cell| cell.trim().to_owned())
                .collect()
        })
        .collect()
}

#[test]
fn the_version_is_that_of_the_code() {
    let version = format!("protocol version: {}\n", protocol::VERSION);
    assert!(
        document().contains(&version),
        "PROTOCOL.md lacks {version:?}"
    );
}

#[test]
fn every_message_is_named() {
    fn check<T: Message>(document: &str) {
        for name in T::NAMES {
            assert!(
                document.contains(&format!("`{name}`")),
                "PROTOCOL.md lacks `{name}`"
            );
        }
    }
    let document = document();
    check::<Init>(&document);
    check::<ToKeeper>(&document);
    check::<ToFetcher>(&document);
    check::<Query>(&document);
    check::<ToReceiver>(&document);
    check::<ToSender>(&document);
    check::<ToProxy>(&document);
    check::<FromProxy>(&document);
    check::<ToSidecar>(&document);
    check::<ToEngine>(&document);
}

#[test]
fn every_reason_has_one_row_with_its_cure() {
    let rows = table("docs/reference/reasons.md", "## Reasons of the sidecars");
    let mut named = BTreeSet::new();
    for row in &rows {
        let [reason, said_by, meaning, cure] = &row[..] else {
            panic!("a row needs reason, side, meaning and cure: {row:?}");
        };
        assert!(named.insert(reason.clone()), "{reason} has two rows");
        assert!(
            ["sender", "receiver", "both"].contains(&said_by.as_str()),
            "{reason} is said by {said_by:?}"
        );
        assert!(
            !meaning.is_empty() && !cure.is_empty(),
            "{reason} is not explained"
        );
    }
    let reasons = Reason::ALL
        .iter()
        .map(|reason| format!("`{reason}`"))
        .collect();
    assert_eq!(
        named, reasons,
        "docs/reference/reasons.md and protocol/src/reason.rs differ"
    );
}

/// Checks that the table of docs/sizing.md shows the values that a sidecar computes.
#[test]
fn the_sizes_of_common_models_are_those_of_their_chunks() {
    let rows = table("docs/sizing.md", "## Common models");
    assert!(rows.len() >= 8, "only {} models", rows.len());
    for row in rows {
        let [
            model,
            layers,
            kv_heads,
            head_size,
            token_bytes,
            slot,
            prompt,
        ] = &row[..]
        else {
            panic!("a row needs seven cells: {row:?}");
        };
        let layout = Layout {
            model: model.clone(),
            dtype: "bfloat16".to_owned(),
            layers: layers.parse().unwrap(),
            kv_heads: kv_heads.parse().unwrap(),
            head_size: head_size.parse().unwrap(),
            mla: model.contains("MLA"),
            chunk_tokens: 256,
            ..Layout::example()
        };
        let bytes = layout.token_bytes().unwrap();
        assert_eq!(token_bytes, &thousands(bytes), "bytes per token of {model}");
        assert_eq!(
            slot,
            &mebibytes(layout.chunk_bytes().unwrap()),
            "slot of {model}"
        );
        assert_eq!(prompt, &mebibytes(bytes * 8192), "8,192 tokens of {model}");
    }
}

/// Writes a number with commas: 131072 as `131,072`.
fn thousands(number: u64) -> String {
    if number < 1000 {
        number.to_string()
    } else {
        format!("{},{:03}", thousands(number / 1000), number % 1000)
    }
}

/// Writes a number of bytes as MiB. Below 100 MiB, a number that is not whole has one decimal.
fn mebibytes(bytes: u64) -> String {
    let tenths = (bytes * 10 + (1 << 19)) >> 20;
    if bytes.is_multiple_of(1 << 20) || tenths >= 1000 {
        format!("{} MiB", thousands((tenths + 5) / 10))
    } else {
        format!("{}.{} MiB", tenths / 10, tenths % 10)
    }
}
