use super::*;
use crate::instance::{Named, Source};
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
    let params = |connector| {
        let decode = instance(InstanceRole::Decode, connector);
        prefill_params(&id, &decode).map(|text| serde_json::from_str::<Value>(&text).unwrap())
    };
    assert_eq!(
        params(Connector::Lmcache).unwrap(),
        json!({"ret_first_tok": true, "disagg_spec": {"req_id": "r-1", "receiver_host": "10.0.0.2",
            "receiver_init_port": [8300, 8301], "receiver_alloc_port": [8400, 8401]}})
    );
    assert_eq!(
        params(Connector::Nixl).unwrap(),
        json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null})
    );
    assert_eq!(params(Connector::P2pNccl), None);
    let decode: Value = serde_json::from_str(&sidecar_decode_params(&id)).unwrap();
    assert_eq!(
        decode,
        json!({"do_remote_prefill": true, "disagg_spec": {"req_id": "r-1"}})
    );
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
    let check = |connector, body: Value, expect: Result<Prefilled, &str>| {
        let found = prefilled(connector, body.to_string().as_bytes());
        assert_eq!(found, expect.map_err(str::to_owned), "{body}");
    };
    let remote = json!({"do_remote_prefill": true, "remote_block_ids": [[1, 2]]});
    check(
        Connector::Nixl,
        json!({"usage": {"prompt_tokens": 5}, "kv_transfer_params": remote}),
        Ok(Prefilled {
            prompt_tokens: Some(5),
            params: Some(remote.to_string()),
            ..Prefilled::default()
        }),
    );
    let none = Err("its answer carries no kv_transfer_params to read the KV by");
    check(
        Connector::Nixl,
        json!({"kv_transfer_params": null}),
        none.clone(),
    );
    check(Connector::Nixl, json!({}), none);
    check(
        Connector::Sidecar,
        json!({"kv_transfer_params": {"pushed": false, "reason": "lora"}}),
        Err("lora"),
    );
    check(Connector::Sidecar, json!({}), Ok(Prefilled::default()));
    check(
        Connector::Lmcache,
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
        Connector::Lmcache,
        json!({"choices": [{"text": "He"}]}),
        Err("its answer carries no first_tok"),
    );
    assert!(prefilled(Connector::Nixl, b"<html>").is_err());
    assert!(prefilled(Connector::Sidecar, b"<html>").is_ok());
}
