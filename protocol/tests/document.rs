//! PROTOCOL.md is held to the message types: their hash, every message, field and reason.

use std::fs;
use std::path::{Path, PathBuf};

use protocol::Reason;
use protocol::codec::Message;
use protocol::local::{ToEngine, ToSidecar};
use protocol::message::{Init, Query, ToReceiver, ToSender};
use protocol::registration::ToProxy;

const SOURCES: [&str; 4] = ["message.rs", "local.rs", "registration.rs", "reason.rs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document() -> String {
    fs::read_to_string(root().join("PROTOCOL.md")).unwrap()
}

/// The sources without comments and white space: what they mean, not how they look.
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

/// FNV-1a: nothing depends on its strength.
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
