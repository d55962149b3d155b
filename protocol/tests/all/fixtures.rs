//! Checks the byte fixtures: this crate reads and writes the same bytes as msgspec.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use protocol::codec::{self, Message};
use protocol::local::{ToEngine, ToSidecar};
use protocol::message::{Init, Query, ToReceiver, ToSender};
use protocol::registration::ToProxy;
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

/// Converts msgpack to JSON as in messages.json.
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

fn again<T: Message + Serialize>(bytes: &[u8]) -> Vec<u8> {
    codec::encode(&codec::decode::<T>(bytes).unwrap())
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
        let after = match entry["set"].as_str().unwrap() {
            "Init" => again::<Init>(&before),
            "Query" => again::<Query>(&before),
            "ToReceiver" => again::<ToReceiver>(&before),
            "ToSender" => again::<ToSender>(&before),
            "ToProxy" => again::<ToProxy>(&before),
            "ToSidecar" => again::<ToSidecar>(&before),
            "ToEngine" => again::<ToEngine>(&before),
            other => panic!("unknown set {other}"),
        };
        match entry["name"].as_str().unwrap() {
            // The fixture has fewer fields than our message; our encoder writes the others with
            // their defaults.
            "alloc_request_lmcache_sync" => assert!(after.len() > before.len()),
            // LMCache's two modes order the fields differently; our encoder uses the order of the
            // other mode.
            "alloc_response_lmcache_sync" => assert_eq!(after.len(), before.len()),
            name => assert_eq!(after, before, "{name}"),
        }
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
    check::<Query>("Query", &seen);
    check::<ToReceiver>("ToReceiver", &seen);
    check::<ToSender>("ToSender", &seen);
    check::<ToProxy>("ToProxy", &seen);
    check::<ToSidecar>("ToSidecar", &seen);
    check::<ToEngine>("ToEngine", &seen);
}
