use super::*;
use crate::connectors::answer::{FirstToken, read};
use crate::openai::fallback::Fallback;
use serde_json::{Value, json};

const ADDRESS: KvAddress<'static> = KvAddress {
    host: "10.0.0.2",
    init_ports: &[8300, 8301],
    alloc_ports: &[8400, 8401],
    zmq: Some("10.0.0.2:21001"),
};

fn handoff(from: Connector, to: Connector) -> &'static dyn Handoff {
    to.receives_from(from).unwrap()
}

fn nixl() -> &'static dyn Handoff {
    handoff(Connector::Nixl, Connector::Nixl)
}

fn sidecar() -> &'static dyn Handoff {
    handoff(Connector::Sidecar, Connector::Sidecar)
}

fn first_token() -> &'static dyn Handoff {
    sidecar().with_first_token().unwrap()
}

fn from_lmcache() -> &'static dyn Handoff {
    handoff(Connector::Lmcache, Connector::Sidecar)
}

fn lmcache() -> &'static dyn Handoff {
    handoff(Connector::Lmcache, Connector::Lmcache)
}

fn p2p_nccl() -> &'static dyn Handoff {
    handoff(Connector::P2pNccl, Connector::P2pNccl)
}

#[test]
fn prefill_legs() {
    let id = RequestId("r-1".into());
    let params = |handoff: &dyn Handoff, overlap| {
        let legs = Legs {
            id: &id,
            decode: ADDRESS,
            overlap,
        };
        let params = handoff.prefill_params(&legs);
        params.map(|text| serde_json::from_str::<Value>(&text).unwrap())
    };
    let of_sidecars = |overlap| params(sidecar(), overlap).unwrap();
    assert_eq!(of_sidecars(true)["disagg_spec"]["overlap"], true);
    assert!(of_sidecars(false)["disagg_spec"]["overlap"].is_null());
    let first = params(first_token(), true).unwrap();
    assert!(first["ret_first_tok"] == true && first["do_remote_decode"] == true);
    let mut to_lmcache = params(lmcache(), false).unwrap();
    to_lmcache.as_object_mut().unwrap().remove("ret_first_tok");
    assert_eq!(params(from_lmcache(), false).unwrap(), to_lmcache);
    assert_eq!(
        params(lmcache(), false).unwrap(),
        json!({"ret_first_tok": true, "disagg_spec": {"req_id": "r-1", "receiver_host": "10.0.0.2",
            "receiver_init_port": [8300, 8301], "receiver_alloc_port": [8400, 8401]}})
    );
    assert_eq!(
        params(nixl(), false).unwrap(),
        json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null})
    );
    assert_eq!(params(p2p_nccl(), false), None);
}

#[test]
fn decode_legs() {
    let id = RequestId("r-1".into());
    let prefilled = Prefilled {
        prompt_tokens: Some(5),
        first: Some(FirstToken::default()),
        ..Prefilled::default()
    };
    let check = |handoff: &dyn Handoff, spec: Value| {
        let params = handoff.decode_params(&id, &prefilled).unwrap();
        let params: Value = serde_json::from_str(&params).unwrap();
        let expect = json!({"do_remote_prefill": true, "disagg_spec": spec});
        assert_eq!(params, expect, "{handoff:?}");
    };
    check(sidecar(), json!({"req_id": "r-1"}));
    check(first_token(), json!({"req_id": "r-1", "tokens": 5}));
    check(from_lmcache(), json!({"req_id": "r-1", "written": true}));
    for handoff in [lmcache(), p2p_nccl()] {
        assert_eq!(handoff.decode_params(&id, &prefilled), None, "{handoff:?}");
    }
}

#[test]
fn pairs() {
    let connectors = [
        Connector::Sidecar,
        Connector::Lmcache,
        Connector::Nixl,
        Connector::P2pNccl,
    ];
    let expect = [
        [Some("Sidecar"), Some("ToLmcache"), None, None],
        [Some("FromLmcache"), Some("ToLmcache"), None, None],
        [None, None, Some("Nixl"), None],
        [None, None, None, Some("P2pNccl")],
    ];
    for (from, row) in connectors.iter().zip(expect) {
        for (to, name) in connectors.iter().zip(row) {
            let found = to.receives_from(*from);
            let found = found.map(|handoff| format!("{handoff:?}"));
            assert_eq!(found.as_deref(), name, "{from:?} {to:?}");
        }
    }
}

#[test]
fn ids_name_both_addresses() {
    let id = p2p_nccl().address_id(&ADDRESS, &ADDRESS).unwrap().0;
    let rest = id
        .strip_prefix("___prefill_addr_10.0.0.2:21001___decode_addr_10.0.0.2:21001_")
        .unwrap_or_else(|| panic!("{id}"));
    assert!(rest.len() == 32 && rest.bytes().all(|b| b.is_ascii_hexdigit()));
    assert_eq!(nixl().address_id(&ADDRESS, &ADDRESS), None);
}

#[test]
fn answers() {
    let check = |handoff: &dyn Handoff, body: Value, expect: Result<Prefilled, &str>| {
        let found = read(handoff, body.to_string().as_bytes());
        let found = found.map_err(|none| (none.fallback, none.text));
        let expect = expect.map_err(|why| (Fallback::NotPushed, why.to_owned()));
        assert_eq!(found, expect, "{body}");
    };
    let remote = json!({"do_remote_prefill": true, "remote_block_ids": [[1, 2]]});
    check(
        nixl(),
        json!({"usage": {"prompt_tokens": 5}, "kv_transfer_params": remote}),
        Ok(Prefilled {
            prompt_tokens: Some(5),
            params: Some(remote.to_string()),
            ..Prefilled::default()
        }),
    );
    let none = Err("its answer carries no kv_transfer_params to read the KV by");
    check(nixl(), json!({"kv_transfer_params": null}), none.clone());
    check(nixl(), json!({}), none);
    check(
        sidecar(),
        json!({"kv_transfer_params": {"pushed": false, "reason": "lora"}}),
        Err("lora"),
    );
    check(sidecar(), json!({}), Ok(Prefilled::default()));
    check(
        lmcache(),
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
        lmcache(),
        json!({"choices": [{"text": "He"}]}),
        Err("its answer carries no first_tok"),
    );
    assert!(read(nixl(), b"<html>").is_err());
    assert!(read(sidecar(), b"<html>").is_ok());
}

#[test]
fn first_tokens() {
    let check = |body: Value, expect: Option<&str>| {
        let mut answer = json!({"usage": {"prompt_tokens": 2}, "prompt_token_ids": [1, 2],
            "kv_transfer_params": {"first_tok": 7}});
        answer["choices"] = json!([body]);
        let prefilled = read(first_token(), answer.to_string().as_bytes()).unwrap();
        let tokens = expect.map(|_| "[1,2]");
        assert_eq!(prefilled.tokens.as_deref(), tokens, "{body}");
        let first = prefilled.first.map(|first| first.text);
        assert_eq!(first.as_deref(), expect, "{body}");
    };
    let length = "length";
    check(json!({"text": "He", "finish_reason": length}), Some("He"));
    check(json!({"text": "", "finish_reason": "stop"}), Some(""));
    // If a token is half a character, the engine sends a replacement character, or sends no
    // text until the character is complete.
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
    // This answer has no token ids.
    let body = br#"{"choices": [{"text": "He", "finish_reason": "length"}], "kv_transfer_params": {"first_tok": 7}}"#;
    assert_eq!(read(first_token(), body).unwrap().first, None);
}
