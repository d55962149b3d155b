//! Checks that the documents agree with the protocol's types: PROTOCOL.md with the messages (their
//! hash, every message, field and reason), docs/reference/reasons.md with the reasons,
//! docs/sizing.md with the size of a chunk.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use protocol::codec::Message;
use protocol::local::{ToEngine, ToSidecar};
use protocol::message::{Init, Query, ToReceiver, ToSender};
use protocol::registration::ToProxy;
use protocol::{Layout, Reason};

const SOURCES: [&str; 4] = ["message.rs", "local.rs", "registration.rs", "reason.rs"];

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

/// Returns the lines of the sources without comments and white space, which do not change the
/// protocol.
fn normalized() -> Vec<(&'static str, Vec<String>)> {
    let source = |name| {
        let text = fs::read_to_string(root().join("protocol/src").join(name)).unwrap();
        let lines = text
            .lines()
            .map(|line| line.split("//").next().unwrap_or_default())
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .filter(|line| !line.is_empty())
            .collect();
        (name, lines)
    };
    SOURCES.map(source).into()
}

/// Returns the FNV-1a hash of the sources. It need not resist attacks.
fn hash() -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for (name, lines) in normalized() {
        for text in std::iter::once(name).chain(lines.iter().map(String::as_str)) {
            for byte in text.bytes().filter(|b| !b.is_ascii_whitespace()) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
    hash
}

#[test]
fn the_hash_is_that_of_the_message_types() {
    let line = "hash of the message types: ";
    let document = document();
    let stated = document.lines().find_map(|l| l.strip_prefix(line));
    let actual = format!("{:016x}", hash());
    assert_eq!(
        stated,
        Some(actual.as_str()),
        "the message types have changed: bring PROTOCOL.md (and protocol/fixtures/messages.json) up to \
         date, raise protocol::VERSION if older peers would misunderstand, then write `{line}{actual}` \
         into PROTOCOL.md"
    );
    let version = format!("protocol version: {}", protocol::VERSION);
    assert!(document.contains(&version), "PROTOCOL.md lacks `{version}`");
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
    check::<Query>(&document);
    check::<ToReceiver>(&document);
    check::<ToSender>(&document);
    check::<ToProxy>(&document);
    check::<ToSidecar>(&document);
    check::<ToEngine>(&document);
}

#[test]
fn every_field_is_named() {
    let document = document();
    let mut fields = 0;
    for (name, lines) in normalized() {
        for line in lines {
            let Some((field, _)) = line.strip_prefix("pub ").and_then(|l| l.split_once(": "))
            else {
                continue;
            };
            if field.contains([' ', '(']) {
                continue;
            }
            fields += 1;
            assert!(
                document.contains(&format!("`{field}`")),
                "PROTOCOL.md lacks the field `{field}` of {name}"
            );
        }
    }
    assert!(fields > 100, "only {fields} fields found");
}

#[test]
fn every_reason_is_explained() {
    let document = document();
    for reason in Reason::ALL.iter().filter(|r| **r != Reason::Unknown) {
        let row = format!("| `{reason}` | ");
        assert!(
            document.contains(&row),
            "PROTOCOL.md does not explain `{reason}`"
        );
    }
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

/// The table of docs/sizing.md must show the values that a sidecar computes.
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

/// Writes 131072 as `131,072`.
fn thousands(number: u64) -> String {
    if number < 1000 {
        number.to_string()
    } else {
        format!("{},{:03}", thousands(number / 1000), number % 1000)
    }
}

/// Writes bytes as MiB, with one decimal below 100 MiB where they are no whole number.
fn mebibytes(bytes: u64) -> String {
    let tenths = (bytes * 10 + (1 << 19)) >> 20;
    if bytes.is_multiple_of(1 << 20) || tenths >= 1000 {
        format!("{} MiB", thousands((tenths + 5) / 10))
    } else {
        format!("{}.{} MiB", tenths / 10, tenths % 10)
    }
}
