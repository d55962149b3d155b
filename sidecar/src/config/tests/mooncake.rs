//! Tests of the translation of Mooncake's `mooncake.json`.

use super::*;

fn json(more: &str) -> String {
    format!(
        r#"{{"prefill_url": "127.0.0.1:13003", "decode_url": "127.0.0.1:13103", {more}
            "protocol": "tcp", "device_name": ""}}"#
    )
}

fn shared_memory() -> (&'static str, String) {
    ("UCX_MM_ERROR_HANDLING", "y".to_owned())
}

fn role(role: &str, file: &str, env: &[(&str, &str)]) -> Inputs {
    inputs(file, env, &[("--role", role)])
}

fn loaded(inputs: &Inputs) -> Config {
    let (config, _) = Config::load(inputs).unwrap_or_else(|r| panic!("{}", r.errors()));
    config
}

#[test]
fn each_side_gets_the_ports_from_its_url() {
    let file = json(r#""metadata_server": "redis://127.0.0.1:6379","#);
    let sender = loaded(&role("sender", &file, &[]));
    assert_eq!(sender.listen, None);
    assert_eq!(sender.admin.to_string(), "127.0.0.1:13052");
    let proxy = sender.proxy.unwrap();
    assert_eq!(proxy.address.to_string(), "redis at 127.0.0.1:6379");
    assert_eq!(proxy.engine_url, "http://127.0.0.1:8100");
    let tls = |tls: &str| vec![("UCX_TLS", tls.to_owned()), shared_memory()];
    assert_eq!(sender.ucx.variables, tls("sm,self,cuda"));
    let trusted = [("PD_SIDECAR_NIXL_OVER_TCP", "trusted")];
    let sender = loaded(&role("sender", &file, &trusted));
    let tcp = [("UCX_TLS", "tcp,sm,self,cuda".to_owned())];
    assert_eq!(
        sender.ucx.variables, tcp,
        "LMCache's agents set no UCX_MM_ERROR_HANDLING"
    );

    let receiver = loaded(&role("receiver", &file, &[("PD_SIDECAR_RANKS", "2")]));
    let ports = |init, alloc, tcp| RankPorts {
        init,
        alloc,
        query: None,
        tcp,
    };
    let listen = receiver.listen.unwrap();
    assert_eq!(listen.host, "127.0.0.1");
    assert_eq!(
        listen.ranks,
        [ports(13112, 13113, 13103), ports(13114, 13115, 13104)]
    );
    assert_eq!(receiver.admin.to_string(), "127.0.0.1:13152");
    assert_eq!(receiver.buffer_bytes, 1_000_000_000);
}

#[test]
fn rdma_devices_get_their_port() {
    for names in [r#""erdma_0,mlx5_1:2""#, r#"["erdma_0", "mlx5_1:2"]"#] {
        let file = json("").replace("tcp", "rdma").replace(r#""""#, names);
        let devices = ("UCX_NET_DEVICES", "erdma_0:1,mlx5_1:2".to_owned());
        let expect = [
            ("UCX_TLS", "ib,sm,self,cuda".to_owned()),
            devices,
            shared_memory(),
        ];
        assert_eq!(loaded(&role("sender", &file, &[])).ucx.variables, expect);
    }
}

#[test]
fn metadata_servers_of_three_kinds_or_none() {
    for (given, expect) in [
        (
            r#""metadata_server": "127.0.0.1:2379","#,
            Some("etcd at 127.0.0.1:2379"),
        ),
        (
            r#""metadata_server": "127.0.0.1", "metadata_backend": "redis","#,
            Some("redis at 127.0.0.1:6379"),
        ),
        (
            r#""metadata_server": "http://127.0.0.1:8080/metadata","#,
            Some("http at 127.0.0.1:8080/metadata"),
        ),
        (r#""metadata_server": "P2PHANDSHAKE","#, None),
    ] {
        let proxy = loaded(&role("sender", &json(given), &[])).proxy;
        let address = proxy.map(|p| p.address.to_string());
        assert_eq!(address.as_deref(), expect, "{given}");
    }
}

#[test]
fn what_is_given_otherwise_wins() {
    let env = [
        ("PD_SIDECAR_PROXY", "127.0.0.1:7500"),
        ("LMCACHE_PD_BUFFER_SIZE", "64MiB"),
    ];
    let file = json(r#""metadata_server": "127.0.0.1:2379","#);
    let config = loaded(&role("receiver", &file, &env));
    assert_eq!(config.buffer_bytes, 64 << 20);
    assert_eq!(config.proxy.unwrap().address.to_string(), "127.0.0.1:7500");
}

#[test]
fn mistakes_are_named_in_mooncakes_words() {
    let near = json("").replace("13103", "13040");
    assert_eq!(
        mistakes(&role("receiver", &near, &[])),
        [
            "x.yaml:1|decode_url|127.0.0.1:13040|the port is less than 50 away from the port of prefill_url, on the same host"
        ]
    );
    let wrong = json(r#""metadata_server": "a", "metadata_backend": "zk","#).replace("tcp", "ipc");
    assert_eq!(
        mistakes(&role("sender", &wrong, &[])),
        [
            "x.yaml:1|metadata_server|a|`zk` is not one of etcd, redis, http",
            "x.yaml:2|protocol|ipc|not a protocol of Mooncake's that the sidecar can use",
        ]
    );
    let nobody = inputs(&json(""), &[], &[]);
    assert_eq!(mistakes(&nobody), ["|pd_role||missing"]);
    let other = json("").replace("127.0.0.1:13003", "10.0.0.1:13003");
    let mistakes = mistakes(&role("sender", &other, &[]));
    assert_eq!(mistakes.len(), 1, "without --insecure: {mistakes:?}");
}
