use super::*;
use crate::fleet::instance::{Named, Source};
use protocol::registration::InstanceRole;
use serde_json::{Value, json};

fn instance(role: InstanceRole, connector: Connector) -> Instance {
    let named = Named {
        role,
        url: "http://10.0.0.2:8200".into(),
        id: None,
        connector,
        host: None,
        init_ports: vec![8300, 8301],
        alloc_ports: vec![8400, 8401],
        zmq: Some("10.0.0.2:21001".into()),
    };
    Instance::named(&named, Source::Configured).unwrap()
}

#[test]
fn prefill_legs() {
    let id = RequestId("r-1".into());
    let decode = instance(InstanceRole::Decode, Connector::Lmcache);
    let params = |way, overlap| {
        prefill_params(&id, way, &decode, overlap)
            .map(|text| serde_json::from_str::<Value>(&text).unwrap())
    };
    let of_sidecars = |overlap| params(HandoffMode::Sidecar, overlap).unwrap();
    assert_eq!(of_sidecars(true)["disagg_spec"]["overlap"], true);
    assert!(of_sidecars(false)["disagg_spec"]["overlap"].is_null());
    let first = params(HandoffMode::FirstToken, true).unwrap();
    assert!(first["ret_first_tok"] == true && first["do_remote_decode"] == true);
    let mut from_lmcache = params(HandoffMode::Lmcache, false).unwrap();
    from_lmcache
        .as_object_mut()
        .unwrap()
        .remove("ret_first_tok");
    assert_eq!(
        params(HandoffMode::FromLmcache, false).unwrap(),
        from_lmcache
    );
    assert_eq!(
        params(HandoffMode::Lmcache, false).unwrap(),
        json!({"ret_first_tok": true, "disagg_spec": {"req_id": "r-1", "receiver_host": "10.0.0.2",
            "receiver_init_port": [8300, 8301], "receiver_alloc_port": [8400, 8401]}})
    );
    assert_eq!(
        params(HandoffMode::Nixl, false).unwrap(),
        json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null})
    );
    assert_eq!(params(HandoffMode::P2pNccl, false), None);
}

#[test]
fn decode_legs() {
    let id = RequestId("r-1".into());
    let check = |way, spec: Value| {
        let params: Value = serde_json::from_str(&decode_params(&id, way, Some(5))).unwrap();
        let expect = json!({"do_remote_prefill": true, "disagg_spec": spec});
        assert_eq!(params, expect, "{way:?}");
    };
    check(HandoffMode::Sidecar, json!({"req_id": "r-1"}));
    check(
        HandoffMode::FirstToken,
        json!({"req_id": "r-1", "tokens": 5}),
    );
    check(
        HandoffMode::FromLmcache,
        json!({"req_id": "r-1", "written": true}),
    );
}

#[test]
fn pairs() {
    let connectors = [
        Connector::Sidecar,
        Connector::Lmcache,
        Connector::Nixl,
        Connector::P2pNccl,
    ];
    let none = None;
    let expect = [
        [
            Some(HandoffMode::Sidecar),
            Some(HandoffMode::Lmcache),
            none,
            none,
        ],
        [
            Some(HandoffMode::FromLmcache),
            Some(HandoffMode::Lmcache),
            none,
            none,
        ],
        [none, none, Some(HandoffMode::Nixl), none],
        [none, none, none, Some(HandoffMode::P2pNccl)],
    ];
    for (from, row) in connectors.iter().zip(expect) {
        for (to, way) in connectors.iter().zip(row) {
            let side = |role, connector| Instance {
                connector,
                ..instance(role, Connector::Nixl)
            };
            let prefill = side(InstanceRole::Prefill, *from);
            let decode = side(InstanceRole::Decode, *to);
            assert_eq!(HandoffMode::of(&prefill, &decode), way, "{from:?} {to:?}");
        }
    }
}

#[test]
fn ids_name_both_addresses() {
    let (p, d) = (
        instance(InstanceRole::Prefill, Connector::P2pNccl),
        instance(InstanceRole::Decode, Connector::P2pNccl),
    );
    let id = leg_id(&RequestId("evil_1.2.3.4:5".into()), &p, &d).0;
    let rest = id
        .strip_prefix("___prefill_addr_10.0.0.2:21001___decode_addr_10.0.0.2:21001_")
        .unwrap_or_else(|| panic!("{id}"));
    assert!(rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit()));
    let d = instance(InstanceRole::Decode, Connector::Nixl);
    assert_eq!(leg_id(&RequestId("r".into()), &p, &d).0, "r");
}

#[test]
fn answers() {
    let check = |way, body: Value, expect: Result<Prefilled, &str>| {
        let found = prefilled(way, body.to_string().as_bytes());
        let expect = expect.map_err(|why| (Fallback::NotPushed, why.to_owned()));
        assert_eq!(found, expect, "{body}");
    };
    let remote = json!({"do_remote_prefill": true, "remote_block_ids": [[1, 2]]});
    check(
        HandoffMode::Nixl,
        json!({"usage": {"prompt_tokens": 5}, "kv_transfer_params": remote}),
        Ok(Prefilled {
            prompt_tokens: Some(5),
            params: Some(remote.to_string()),
            ..Prefilled::default()
        }),
    );
    let none = Err("its answer carries no kv_transfer_params to read the KV by");
    check(
        HandoffMode::Nixl,
        json!({"kv_transfer_params": null}),
        none.clone(),
    );
    check(HandoffMode::Nixl, json!({}), none);
    check(
        HandoffMode::Sidecar,
        json!({"kv_transfer_params": {"pushed": false, "reason": "lora"}}),
        Err("lora"),
    );
    check(HandoffMode::Sidecar, json!({}), Ok(Prefilled::default()));
    check(
        HandoffMode::Lmcache,
        json!({"choices": [{"text": "He", "finish_reason": "length"}],
            "kv_transfer_params": {"first_tok": 7}}),
        Ok(Prefilled {
            first: Some(FirstToken {
                id: 7,
                text: "He".into(),
                finish_reason: Some("length".into()),
            }),
            ..Prefilled::default()
        }),
    );
    check(
        HandoffMode::Lmcache,
        json!({"choices": [{"text": "He"}]}),
        Err("its answer carries no first_tok"),
    );
    assert!(prefilled(HandoffMode::Nixl, b"<html>").is_err());
    assert!(prefilled(HandoffMode::Sidecar, b"<html>").is_ok());
}

#[test]
fn first_tokens() {
    let check = |body: Value, expect: Option<&str>| {
        let mut answer = json!({"usage": {"prompt_tokens": 2}, "prompt_token_ids": [1, 2],
            "kv_transfer_params": {"first_tok": 7}});
        answer["choices"] = json!([body]);
        let text = answer.to_string();
        let first = first_token(7, text.as_bytes()).map(|(first, _)| first.text);
        assert_eq!(first.as_deref(), expect, "{body}");
        let prefilled = prefilled(HandoffMode::FirstToken, text.as_bytes()).unwrap();
        let tokens = expect.map(|_| "[1,2]");
        assert_eq!(prefilled.tokens.as_deref(), tokens, "{body}");
        assert_eq!(prefilled.first.is_some(), expect.is_some(), "{body}");
    };
    let length = "length";
    check(json!({"text": "He", "finish_reason": length}), Some("He"));
    check(json!({"text": "", "finish_reason": "stop"}), Some(""));
    // Half a character, and one that is held back until the other half is there.
    check(json!({"text": "\u{fffd}", "finish_reason": length}), None);
    check(json!({"text": "", "finish_reason": length}), None);
    check(
        json!({"message": {"content": "He", "reasoning": null}, "finish_reason": length}),
        Some("He"),
    );
    for message in [
        json!({"content": null, "reasoning": "Hm"}),
        json!({"content": "He", "reasoning_content": "Hm"}),
        json!({"content": null}),
    ] {
        check(json!({"message": message, "finish_reason": length}), None);
    }
    // An engine that does not give token ids.
    let body = br#"{"choices": [{"text": "He", "finish_reason": "length"}], "kv_transfer_params": {"first_tok": 7}}"#;
    assert_eq!(
        prefilled(HandoffMode::FirstToken, body).unwrap().first,
        None
    );
}
