use serde_bytes::ByteBuf;

use super::*;
use crate::Reason;
use crate::message::{AllocResponse, AllocResponseX, NixlInitRequest};

fn map(entries: &[(&str, rmpv::Value)]) -> Vec<u8> {
    let entries = entries
        .iter()
        .map(|(key, value)| ((*key).into(), value.clone()))
        .collect();
    value(&rmpv::Value::Map(entries))
}

fn value(value: &rmpv::Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    rmpv::encode::write_value(&mut bytes, value).unwrap();
    bytes
}

fn list(items: &[i64]) -> rmpv::Value {
    rmpv::Value::Array(items.iter().map(|i| (*i).into()).collect())
}

fn response(remote: rmpv::Value, sent: rmpv::Value) -> Vec<u8> {
    map(&[
        ("type", "AllocResponse".into()),
        ("remote_indexes", remote),
        ("already_sent_indexes", sent),
    ])
}

fn accepted(bytes: &[u8]) -> AllocResponse {
    match decode(bytes) {
        Ok(ToSender::AllocResponse(response)) => response,
        other => panic!("{other:?}"),
    }
}

fn refused<T: Message + std::fmt::Debug>(bytes: &[u8], expected: &str) {
    let error = decode::<T>(bytes).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn what_msgspec_takes_is_taken() {
    let plain = AllocResponse {
        remote_indexes: vec![300, -1],
        already_sent_indexes: vec![1],
        x: None,
        ..AllocResponse::example()
    };
    assert_eq!(accepted(&response(list(&[300, -1]), list(&[1]))), plain);
    // The keys have another order, `type` comes last, and there are unknown keys with values of any
    // type.
    let bytes = map(&[
        ("new", rmpv::Value::Ext(5, vec![1, 2, 3])),
        ("already_sent_indexes", list(&[1])),
        (
            "newer",
            rmpv::Value::Array(vec![1.5.into(), rmpv::Value::Nil, map_value()]),
        ),
        ("remote_indexes", list(&[300, -1])),
        ("type", "AllocResponse".into()),
    ]);
    assert_eq!(accepted(&bytes), plain);
    // Integers that are wider than necessary: 300 in eight bytes, −1 in eight bytes, 1 in four
    // bytes.
    let mut bytes = vec![0x83];
    bytes.extend_from_slice(b"\xa4type\xadAllocResponse\xaeremote_indexes\x92");
    bytes.extend_from_slice(&[0xcf, 0, 0, 0, 0, 0, 0, 1, 44]);
    bytes.extend_from_slice(&[0xd3, 255, 255, 255, 255, 255, 255, 255, 255]);
    bytes.extend_from_slice(b"\xb4already_sent_indexes\x91\xce\0\0\0\x01");
    assert_eq!(accepted(&bytes), plain);
}

fn map_value() -> rmpv::Value {
    rmpv::Value::Map(vec![(7.into(), "seven".into())])
}

#[test]
fn another_form_is_refused() {
    let good = response(list(&[1]), list(&[]));
    refused::<ToSender>(&[&good[..], b"\xc0"].concat(), "bytes after the message");
    refused::<ToSender>(&response(list(&[1]), "[]".into()), "invalid type");
    refused::<ToSender>(
        &response(rmpv::Value::Array(vec![1.0.into()]), list(&[])),
        "invalid type: floating point",
    );
    refused::<ToSender>(&response(list(&[1]), list(&[-1])), "invalid value");
    refused::<ToSender>(&value(&list(&[1, 2])), "not a map");
    refused::<ToSender>(&map(&[("type", 5.into())]), "`type` is not text");
    refused::<ToSender>(&map(&[("remote_indexes", list(&[]))]), "no key `type`");
    refused::<ToSender>(
        &map(&[("type", "Ack".into()), ("type", "Ack".into())]),
        "two keys",
    );
    refused::<ToSender>(&map(&[("type", "AllocResponse".into())]), "missing field");
    refused::<ToSender>(
        &map(&[("type", "AllocRequest".into())]),
        "unknown message type \"AllocRequest\"",
    );
    // Text instead of bytes, and bytes instead of text.
    refused::<Init>(
        &map(&[
            ("type", "NixlInitRequest".into()),
            ("local_meta_bytes", "abc".into()),
        ]),
        "invalid type: text, expected byte array",
    );
    refused::<ToReceiver>(
        &map(&[
            ("type", "CancelNotif".into()),
            ("keys", rmpv::Value::Array(Vec::new())),
            ("req_id", rmpv::Value::Binary(b"7".to_vec())),
        ]),
        "expected a string",
    );
    // A struct as a list, below the top level.
    let mut x = vec![
        ("type".into(), "ProxyNotif".into()),
        ("req_id".into(), "r".into()),
    ];
    x.push((
        "x".into(),
        rmpv::Value::Array(vec![1.into(), true.into(), 0.into(), 0.into(), "".into()]),
    ));
    refused::<ToProxy>(&value(&rmpv::Value::Map(x)), "expected struct NotifX");
    refused::<ToProxy>(
        &map(&[("type", "ProxyNotif".into()), ("req_id", "a\nb".into())]),
        "control characters",
    );
}

#[test]
fn every_cut_is_refused() {
    let whole = encode(&ToSender::AllocResponse(AllocResponse {
        remote_indexes: vec![70_000, -1, 5],
        already_sent_indexes: vec![],
        x: Some(AllocResponseX {
            seq: 1 << 40,
            epoch: crate::Epoch(9),
            lease: None,
            have_tokens: 3,
            window: 0,
            reason: Some(Reason::NoRoom),
            retry_ms: 50,
            ..AllocResponseX::example()
        }),
        ..AllocResponse::example()
    }));
    assert!(decode::<ToSender>(&whole).is_ok());
    for len in 0..whole.len() {
        assert!(decode::<ToSender>(&whole[..len]).is_err(), "cut to {len}");
    }
}

#[test]
fn caps_hold_before_anything_is_allocated() {
    let extra = |extra: rmpv::Value| {
        map(&[
            ("type", "AllocResponse".into()),
            ("remote_indexes", list(&[])),
            ("already_sent_indexes", list(&[])),
            ("extra", extra),
        ])
    };
    let nested = |depth: usize| {
        (1..depth).fold(rmpv::Value::Array(vec![1.into()]), |v, _| {
            rmpv::Value::Array(vec![v])
        })
    };
    // The message's own map is the first level.
    assert!(decode::<ToSender>(&extra(nested(MAX_DEPTH - 1))).is_ok());
    refused::<ToSender>(&extra(nested(MAX_DEPTH)), "limit on depth");
    refused::<ToSender>(&extra(nested(1000)), "limit on depth");
    assert!(decode::<ToSender>(&extra("x".repeat(MAX_TEXT_BYTES).into())).is_ok());
    refused::<ToSender>(
        &extra("x".repeat(MAX_TEXT_BYTES + 1).into()),
        "limit on text",
    );
    let many = list(&vec![0; MAX_ELEMENTS - 8]);
    assert!(decode::<ToSender>(&extra(many)).is_ok());
    refused::<ToSender>(&extra(list(&vec![0; MAX_ELEMENTS])), "limit on elements");
    let long = Init::NixlInitRequest(NixlInitRequest {
        local_meta_bytes: ByteBuf::from(vec![0; MAX_BYTES]),
        x: None,
        ..NixlInitRequest::example()
    });
    refused::<Init>(&encode(&long), "at most 4194304");
    // The count announces elements that are missing.
    for announced in [
        &b"\x81\xdf\xff\xff\xff\xff"[..],
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xdb\xff\xff\xff\xff",
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
        b"\x82\xa4type\xadAllocResponse\xaeremote_indexes\xdd\x00\x10\x00\x00\x01",
    ] {
        assert!(decode::<ToSender>(announced).is_err(), "{announced:x?}");
    }
}
