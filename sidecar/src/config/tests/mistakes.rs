//! Tests with wrong configurations and their error messages.

use super::{RECEIVER, SENDER, check, inputs, load, mistakes};
use crate::config::*;

#[test]
fn everything_that_is_missing_is_said_at_once() {
    let empty = ["|pd_role||missing", "|pd_buffer_size||missing"];
    check("", &empty);
    check(
        "pd_role: receiver\npd_proxy_host: a\n",
        &[
            "|pd_buffer_size||missing",
            "|pd_peer_host||missing, and required because pd_role is receiver",
            "|pd_peer_init_port||missing, and required because pd_role is receiver",
            "|pd_peer_alloc_port||missing, and required because pd_role is receiver",
            "|pd_proxy_port||missing, and required because pd_proxy_host is set",
        ],
    );
    check("a: [", &["x.yaml:1|||not YAML: unclosed bracket '['"]);
    let report = Config::load(&inputs("", &[], &[])).unwrap_err();
    assert_eq!(
        report.errors(),
        "error: pd_role: missing; set pd_role to sender, receiver or both, or give --role, or set \
         LMCACHE_PD_ROLE\n\
         error: pd_buffer_size: missing; set pd_buffer_size to bytes (1073741824) or a size with a \
         unit (1GiB, 1024MiB, 1.5GB), or give --buffer-size, or set LMCACHE_PD_BUFFER_SIZE\n\
         2 mistakes in the configuration; docs/reference/configuration.md explains every key\n"
    );
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    check(
        "pd_role: prefill\npd_buffer_size: 4G\nenable_pd: no\nsidecar:\n  heartbeat_ms: 1\n  log_level: 'a=b=c'\n  admin: x\n",
        &[
            "x.yaml:1|pd_role|prefill|not one of the possible values",
            "x.yaml:2|pd_buffer_size|4G|`G` may mean GiB or GB",
            "x.yaml:7|sidecar.admin|x|no port",
            "x.yaml:3|enable_pd|false|a sidecar does only PD",
        ],
    );
    // Each of these files has one mistake, on line 3.
    let sender = |more: &str| format!("pd_role: sender\npd_buffer_size: 1GiB\n{more}");
    for (more, expect) in [
        (
            "pd_buffer_size: 2\n",
            "x.yaml:3|||`pd_buffer_size` is already set on line 2",
        ),
        (
            "nixl_buffer_size: 2\n",
            "x.yaml:3|nixl_buffer_size|2|another name of `pd_buffer_size`, which line 2 sets to `1GiB`",
        ),
        (
            "pd_buffer_device: rocm\n",
            "x.yaml:3|pd_buffer_device|rocm|not a kind of memory for buffers",
        ),
        (
            "pd_buffer_device: cuda:GPU-12\n",
            "x.yaml:3|pd_buffer_device|cuda:GPU-12|neither a GPU's number nor its UUID",
        ),
        (
            "pd_buffer_device: [cuda:0, cuda:1]\n",
            "x.yaml:3|pd_buffer_device|[cuda:0, cuda:1]|2 devices for 1 ranks",
        ),
        (
            "pd_buffer_device: cuda:1\nsidecar: {ranks: 2}\n",
            "x.yaml:3|pd_buffer_device|cuda:1|one GPU for 2 ranks",
        ),
        (
            "nixl_backends: [UCX, GDS]\n",
            "x.yaml:3|nixl_backends|[UCX, GDS]|this version drives NIXL's UCX backend only",
        ),
        (
            "transfer_channel: mooncake\n",
            "x.yaml:3|transfer_channel|mooncake|LMCache's PD has only nixl",
        ),
        (
            "enable_p2p: True\n",
            "x.yaml:3|enable_p2p|True|LMCache does not allow it together with PD, and the sidecar does only PD",
        ),
        (
            "pd_bidirectional: on\n",
            "x.yaml:3|pd_bidirectional|on|KV moves from prefill to decode only",
        ),
        (
            "nixl_peer_port: 5\n",
            "x.yaml:3|nixl_peer_port|5|LMCache no longer has this key: a receiver has two ports",
        ),
        (
            "sidecar: {heartbeat_ms: 1}\n",
            "x.yaml:3|sidecar.heartbeat_ms|1|so short a period would keep a core busy",
        ),
        (
            "sidecar: {socket: a.sock}\n",
            "x.yaml:3|sidecar.socket|a.sock|not an absolute path",
        ),
        (
            "sidecar: {id: 'a b'}\n",
            "x.yaml:3|sidecar.id|a b|not a name that logs and metrics can show",
        ),
        (
            "sidecar: {ranks: 65}\n",
            "x.yaml:3|sidecar.ranks|65|too many",
        ),
        (
            "sidecar: {proxy: 'h:0'}\n",
            "x.yaml:3|sidecar.proxy|h:0|port 0 and wildcard hosts are not addresses to connect to",
        ),
        ("sidecar: [1]\n", "x.yaml:3|sidecar|[1]|not a mapping"),
        ("a: [\n", "x.yaml:3|||not YAML: unclosed bracket '['"),
    ] {
        let found = mistakes(&inputs(&sender(more), &[], &[]));
        assert!(
            found.iter().any(|m| m == expect),
            "{more}: {found:#?}\nexpected {expect}"
        );
    }
}

#[test]
fn ports_must_fit_together() {
    for (from, to, expect) in [
        ("[7400, 7401]", "7400", "1 alloc and 2 init ports"),
        ("[7400, 7401]", "[7400, 7301]", "port 7301 is used twice"),
        (
            "pd_role",
            "sidecar: {ranks: 3}\npd_role",
            "the port lists name 2 ranks",
        ),
        (
            "pd_role",
            "sidecar: {tcp_port: 65535}\npd_role",
            "the port of rank 1 would be above 65535",
        ),
        (
            "pd_role",
            "sidecar: {tcp_port: 7399}\npd_role",
            "port 7400 is used twice",
        ),
        (
            "pd_role",
            "sidecar: {admin: '127.0.0.1:7300'}\npd_role",
            "port 7300 is used twice",
        ),
        ("[7400, 7401]", "[7400, 7900]", "port 7900 is used twice"),
        (
            "127.0.0.1\npd_peer_init",
            "0.0.0.0\npd_peer_init",
            "senders cannot connect to a wildcard address",
        ),
    ] {
        let file = RECEIVER.replacen(from, to, 1);
        let found = mistakes(&inputs(&file, &[], &[("--insecure", "on")]));
        assert!(
            found.iter().any(|m| m.ends_with(expect)),
            "{file}{found:#?}\nexpected {expect}"
        );
    }
    let (config, _) = load(&RECEIVER.replacen("pd_role", "sidecar: {tcp_port: 7500}\npd_role", 1));
    let tcp: Vec<_> = config.listen.unwrap().ranks.iter().map(|r| r.tcp).collect();
    assert_eq!(tcp, [7500, 7501]);
}

#[test]
fn listening_beyond_this_machine_must_be_asked_for() {
    let file = RECEIVER.replacen("127.0.0.1", "10.0.0.2", 1) + "sidecar: {admin: '0.0.0.0:7900'}\n";
    let expect = [
        "x.yaml:8|sidecar.admin|0.0.0.0:7900|the proxy cannot call back a wildcard address",
        "x.yaml:3|pd_peer_host|10.0.0.2|it listens beyond this machine, and peers need no key",
        "x.yaml:8|sidecar.admin|0.0.0.0:7900|it listens beyond this machine, and peers need no key",
    ];
    check(&file, &expect);
    for (env, flags) in [
        (vec![], vec![("--insecure", "on")]),
        (vec![("PD_SIDECAR_INSECURE", "yes")], vec![]),
    ] {
        let mut inputs = inputs(&file, &env, &flags);
        inputs
            .env
            .push(("PD_SIDECAR_ADVERTISE_HOST".to_owned(), "gpu-7".to_owned()));
        let (config, report) = Config::load(&inputs).unwrap_or_else(|r| panic!("{}", r.errors()));
        assert_eq!(config.admin_url(7900), "http://gpu-7:7900");
        assert_eq!(config.listen.unwrap().advertise, "gpu-7");
        assert!(
            report.warnings.iter().any(|w| w.starts_with(
                "INSECURE: without authentication beyond this machine: pd_peer_host 10.0.0.2, sidecar.admin 0.0.0.0:7900;"
            )),
            "{:?}",
            report.warnings
        );
    }
}

#[test]
fn ucx_listens_by_consent_only() {
    let consent = ("PD_SIDECAR_NIXL_OVER_TCP", "trusted");
    let of = |file: &str, env: &[(&str, &str)], flags: &[(&'static str, &str)]| {
        Config::load(&inputs(file, env, flags)).map(|(config, _)| config.ucx)
    };
    let ucx = of(RECEIVER, &[], &[]).unwrap();
    assert!(ucx.variables.contains(&("UCX_TLS", "^tcp".to_owned())));
    assert_eq!(ucx.tcp_host, None);
    for tls in ["tcp", "all", "tcp,sm"] {
        let env = [("UCX_TLS", tls)];
        let found = mistakes(&inputs(RECEIVER, &env, &[]));
        let what = format!(
            "environment UCX_TLS|sidecar.nixl_over_tcp|refused|UCX_TLS={tls} lets UCX open TCP ports, \
             and any program that reaches such a port can read and write the memory of this process"
        );
        assert_eq!(found, [what]);
        // Without NIXL the variable has no effect.
        assert!(of(RECEIVER, &env, &[("--transport", "tcp")]).is_ok());
        let ucx = of(RECEIVER, &[env[0], consent], &[]).unwrap();
        assert_eq!(ucx.tcp_host.as_deref(), Some("127.0.0.1"));
    }
    // Ports that UCX opens beyond this machine also need `insecure`.
    let far = SENDER.replacen("proxy:", "advertise_host: 10.0.0.2, proxy:", 1);
    let open = "environment PD_SIDECAR_NIXL_OVER_TCP|sidecar.nixl_over_tcp|trusted|it listens beyond this machine, and \
                peers need no key";
    assert_eq!(mistakes(&inputs(&far, &[consent], &[])), [open]);
    let ucx = of(&far, &[consent], &[("--insecure", "on")]).unwrap();
    assert_eq!(ucx.tcp_host.as_deref(), Some("10.0.0.2"));
    let devices = ("UCX_NET_DEVICES", "eth0");
    assert_eq!(mistakes(&inputs(SENDER, &[consent, devices], &[])), [open]);
    // The process itself chose this interface and restarted itself, so the user has named no interface.
    let own = ("PD_UCX_NET_DEVICES", "eth0");
    assert!(
        !of(SENDER, &[consent, devices, own], &[])
            .unwrap()
            .devices_given
    );
}

/// Kubernetes sets these variables in every pod, for each service of the namespace.
#[test]
fn variables_of_kubernetes_services_stop_no_start() {
    let services = [
        ("LMCACHE_PD_PROXY_PORT", "tcp://10.0.0.1:7500"),
        ("LMCACHE_PD_PROXY_PORT_7500_TCP", "tcp://10.0.0.1:7500"),
        ("LMCACHE_PD_PROXY_PORT_7500_TCP_ADDR", "10.0.0.1"),
        ("LMCACHE_PD_PROXY_PORT_7500_TCP_PORT", "7500"),
        ("LMCACHE_PD_PROXY_PORT_7500_TCP_PROTO", "tcp"),
        ("LMCACHE_PD_PROXY_SERVICE_HOST", "10.0.0.1"),
        ("LMCACHE_PD_PROXY_SERVICE_PORT", "7500"),
        ("LMCACHE_PD_PROXY_SERVICE_PORT_REGISTRATION", "7500"),
        ("LMCACHE_PD_PEER_INIT_PORT", "tcp://[fd00::1]:7300"),
        ("PD_SIDECAR_TCP_PORT", "tcp://10.0.0.1:7500"),
        ("PD_SIDECAR_PORT", "udp://10.0.0.1:7500"),
    ];
    let (config, report) = Config::load(&inputs(RECEIVER, &services, &[]))
        .unwrap_or_else(|r| panic!("{}", r.errors()));
    let (plain, _) = load(RECEIVER);
    assert_eq!(config.listen, plain.listen);
    assert_eq!(config.proxy, plain.proxy);
    for (name, value) in services {
        let note = format!(
            "environment {name}={value}: ignored, because it describes a Kubernetes service"
        );
        let noted = report
            .warnings
            .iter()
            .filter(|w| w.contains(name) && w.starts_with(&note));
        assert_eq!(noted.count(), 1, "{name}: {:?}", report.warnings);
    }
    for value in [
        "tcp://10.0.0.1",
        "http://10.0.0.1:7500",
        "tcp://10.0.0.1:7500/x",
        "tcp:7500",
    ] {
        let found = mistakes(&inputs(RECEIVER, &[("PD_SIDECAR_TCP_PORT", value)], &[]));
        assert_eq!(found.len(), 1, "{value}: {found:?}");
    }
}

/// With keys and protected data, every address may be used without a further word. A channel that keys do not close is named,
/// with the cure for it.
#[test]
fn with_keys_only_open_channels_need_consent() {
    use common::identity::keygen;

    let folder = tempfile::tempdir().unwrap();
    let (key, roster) = (folder.path().join("key"), folder.path().join("roster"));
    let public = keygen(&key).unwrap();
    std::fs::write(
        &roster,
        format!("{public}: {{name: a, roles: [receiver]}}\n"),
    )
    .unwrap();
    let file = |rest: &str| {
        RECEIVER.replacen("127.0.0.1", "10.0.0.2", 1)
            + &format!(
                "sidecar: {{admin: '10.0.0.2:7900', auth: require, key_file: {}, roster: {}{rest}}}\n",
                key.display(),
                roster.display()
            )
    };
    let found = |rest: &str| mistakes(&inputs(&file(rest), &[], &[]));
    let channels = |rest: &str| {
        let inputs = inputs(&file(rest), &[], &[]);
        let (config, report) = Config::load(&inputs).unwrap_or_else(|r| panic!("{}", r.errors()));
        assert!(!report.warnings.iter().any(|w| w.contains("INSECURE")));
        let all = crate::config::channels::of(&config).into_iter();
        let data = all.filter(|channel| channel.name == "data");
        data.map(|channel| channel.protection).collect::<Vec<_>>()
    };
    assert!(
        channels("")
            .iter()
            .all(|data| data.contains("each part is encrypted"))
    );
    let authenticated = channels(", data: authenticated");
    assert!(
        authenticated
            .iter()
            .all(|data| data.contains("each part has a tag; anybody"))
    );
    // Without the built-in TCP transport there is no such channel.
    assert_eq!(found(", data: plain, transport: nixl"), [""; 0]);
    let plain = &found(", data: plain")[..];
    assert!(
        plain.len() == 1 && plain[0].contains("the data channel listens beyond this machine"),
        "{plain:?}"
    );
    let ucx = &found(", nixl_over_tcp: trusted")[..];
    assert!(
        ucx.len() == 1 && ucx[0].contains("the UCX channel listens"),
        "{ucx:?}"
    );
    let prefer = file("").replace("auth: require", "auth: prefer");
    let prefer = mistakes(&inputs(&prefer, &[], &[]));
    assert_eq!(prefer.len(), 2, "{prefer:?}");
    let query = file("") + "pd_peer_query_port: [7500, 7501]\n";
    let query = mistakes(&inputs(&query, &[], &[]));
    assert!(
        query.len() == 1 && query[0].contains("the query channel"),
        "{query:?}"
    );
    let off = RECEIVER.to_owned() + "sidecar: {data: sealed}\n";
    let off = mistakes(&inputs(&off, &[], &[]));
    assert!(
        off.len() == 1 && off[0].contains("sidecar.auth is off"),
        "{off:?}"
    );
}
