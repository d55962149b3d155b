//! Checks the byte fixtures: this crate must read and write the same bytes as msgspec.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use protocol::codec::{self, Message};
use protocol::keep::{ToFetcher, ToKeeper};
use protocol::local::{ToEngine, ToSidecar};
use protocol::message::{Init, Query, ToReceiver, ToSender};
use protocol::registration::{FromProxy, ToProxy};
use serde::Serialize;
use serde_json::Value;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn entries() -> Vec<Value> {
    let text = fs::read_to_string(directory().join("messages.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn bytes(entry: &Value) -> Vec<u8> {
    let name = entry["name"].as_str().unwrap();
    fs::read(directory().join(format!("{name}.bin"))).unwrap()
}

/// Converts msgpack to JSON in the form of messages.json.
fn json(value: &rmpv::Value) -> Value {
    match value {
        rmpv::Value::Nil => Value::Null,
        rmpv::Value::Boolean(v) => (*v).into(),
        rmpv::Value::Integer(v) => match v.as_u64() {
            Some(v) => v.into(),
            None => v.as_i64().unwrap().into(),
        },
        rmpv::Value::String(v) => v.as_str().unwrap().into(),
        rmpv::Value::Binary(v) => {
            let hex: String = v.iter().map(|b| format!("{b:02x}")).collect();
            serde_json::json!({ "hex": hex })
        }
        rmpv::Value::Array(items) => items.iter().map(json).collect(),
        rmpv::Value::Map(entries) => entries
            .iter()
            .map(|(k, v)| (k.as_str().unwrap().to_owned(), json(v)))
            .collect(),
        rmpv::Value::F32(_) | rmpv::Value::F64(_) | rmpv::Value::Ext(..) => {
            panic!("no message has {value}")
        }
    }
}

/// Decodes a message of the entry's set and encodes it again.
fn again(entry: &Value, bytes: &[u8]) -> Vec<u8> {
    fn of<T: Message + Serialize>(bytes: &[u8]) -> Vec<u8> {
        codec::encode(&codec::decode::<T>(bytes).unwrap())
    }
    match entry["set"].as_str().unwrap() {
        "Init" => of::<Init>(bytes),
        "ToKeeper" => of::<ToKeeper>(bytes),
        "ToFetcher" => of::<ToFetcher>(bytes),
        "Query" => of::<Query>(bytes),
        "ToReceiver" => of::<ToReceiver>(bytes),
        "ToSender" => of::<ToSender>(bytes),
        "ToProxy" => of::<ToProxy>(bytes),
        "FromProxy" => of::<FromProxy>(bytes),
        "ToSidecar" => of::<ToSidecar>(bytes),
        "ToEngine" => of::<ToEngine>(bytes),
        other => panic!("unknown set {other}"),
    }
}

/// Adds an unknown field to a map and to all maps inside this map.
fn add_field(value: &mut rmpv::Value) {
    match value {
        rmpv::Value::Array(items) => items.iter_mut().for_each(add_field),
        rmpv::Value::Map(entries) => {
            entries.iter_mut().for_each(|(_, v)| add_field(v));
            entries.push(("field_of_a_newer_peer".into(), "1".into()));
        }
        _ => {}
    }
}

fn same(entry: &Value, bytes: &[u8]) {
    let tree = rmpv::decode::read_value(&mut &bytes[..]).unwrap();
    assert_eq!(json(&tree), entry["message"], "{}", entry["name"]);
}

#[test]
fn files_hold_the_described_messages() {
    for entry in entries() {
        same(&entry, &bytes(&entry));
    }
}

#[test]
fn every_fixture_comes_back_byte_for_byte() {
    for entry in entries() {
        let before = bytes(&entry);
        let after = again(&entry, &before);
        match entry["name"].as_str().unwrap() {
            // The fixture has fewer fields than our message; our encoder writes the missing fields
            // with their defaults.
            "alloc_request_lmcache_sync" => assert!(after.len() > before.len()),
            // LMCache's two modes order the fields differently; our encoder uses the order of the
            // other mode.
            "alloc_response_lmcache_sync" => assert_eq!(after.len(), before.len()),
            name => assert_eq!(after, before, "{name}"),
        }
    }
}

/// A newer peer may add fields to any message and to any map inside a message.
#[test]
fn a_field_that_is_not_known_changes_nothing() {
    for entry in entries() {
        let known = bytes(&entry);
        let mut tree = rmpv::decode::read_value(&mut &known[..]).unwrap();
        add_field(&mut tree);
        let mut newer = Vec::new();
        rmpv::encode::write_value(&mut newer, &tree).unwrap();
        let (with, without) = (again(&entry, &newer), again(&entry, &known));
        assert_eq!(with, without, "{}", entry["name"]);
    }
}

#[test]
fn every_message_has_a_fixture() {
    fn check<T: Message>(set: &str, seen: &BTreeSet<(String, String)>) {
        for name in T::NAMES {
            let key = (set.to_owned(), (*name).to_owned());
            assert!(seen.contains(&key), "no fixture of {set}::{name}");
        }
    }
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let seen = entries()
        .iter()
        .map(|entry| (text(&entry["set"]), text(&entry["message"]["type"])))
        .collect();
    check::<Init>("Init", &seen);
    check::<ToKeeper>("ToKeeper", &seen);
    check::<ToFetcher>("ToFetcher", &seen);
    check::<Query>("Query", &seen);
    check::<ToReceiver>("ToReceiver", &seen);
    check::<ToSender>("ToSender", &seen);
    check::<ToProxy>("ToProxy", &seen);
    check::<FromProxy>("FromProxy", &seen);
    check::<ToSidecar>("ToSidecar", &seen);
    check::<ToEngine>("ToEngine", &seen);
}
