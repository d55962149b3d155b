//! Tests with configurations as users write them.

mod devices;
mod fetch;
mod mistakes;
mod mooncake;

use super::key::{Default, Key};
use super::*;

const RECEIVER: &str = "\
pd_role: receiver
pd_buffer_size: 1GiB
pd_peer_host: 127.0.0.1
pd_peer_init_port: [7300, 7301]
pd_peer_alloc_port: [7400, 7401]
pd_proxy_host: 127.0.0.1
pd_proxy_port: 7500
";

const SENDER: &str = "\
pd_role: sender
pd_buffer_size: 1GiB
sidecar: {proxy: '127.0.0.1:7500'}
";

fn inputs(file: &str, env: &[(&str, &str)], flags: &[(&'static str, &str)]) -> Inputs {
    Inputs {
        flags: flags.iter().map(|(f, v)| (*f, (*v).to_owned())).collect(),
        env: env
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect(),
        file: Some((PathBuf::from("x.yaml"), file.to_owned())),
        hostname: "host".to_owned(),
        uid: 1000,
        pid: 42,
    }
}

fn load(file: &str) -> (Config, Report) {
    Config::load(&inputs(file, &[], &[])).unwrap_or_else(|r| panic!("{}", r.errors()))
}

/// Returns every mistake of a configuration, without the advice.
fn mistakes(inputs: &Inputs) -> Vec<String> {
    let problems = Config::load(inputs)
        .err()
        .map_or(Vec::new(), |report| report.problems);
    problems
        .iter()
        .map(|p| {
            assert!(
                !p.right.is_empty() || p.key.is_empty(),
                "says what would be right: {p}"
            );
            format!("{}|{}|{}|{}", p.place, p.key, p.value, p.what)
        })
        .collect()
}

fn check(file: &str, expect: &[&str]) {
    assert_eq!(mistakes(&inputs(file, &[], &[])), expect, "{file}");
}

#[test]
fn the_smallest_files_are_enough() {
    let (config, _) = load(RECEIVER);
    assert_eq!(config.role, Role::Receiver);
    assert_eq!((config.ranks, config.buffer_bytes), (2, 1 << 30));
    let listen = config.listen.clone().unwrap();
    assert_eq!(
        (listen.host.as_str(), listen.advertise.as_str()),
        ("127.0.0.1", "127.0.0.1")
    );
    assert_eq!(
        listen.ranks[1],
        RankPorts {
            init: 7301,
            alloc: 7401,
            query: None,
            tcp: 0
        }
    );
    assert_eq!(config.admin.to_string(), "127.0.0.1:7900");
    assert_eq!(config.admin_url(7900), "http://127.0.0.1:7900");
    assert_eq!(config.id, "host-receiver-7900");
    assert_eq!(
        config.socket.to_str(),
        Some("/tmp/pd-sidecar-1000/receiver.sock")
    );
    let proxy = config.proxy.as_ref().unwrap();
    assert_eq!(proxy.address.to_string(), "127.0.0.1:7500");
    assert_eq!(proxy.engine_url, "http://127.0.0.1:8200");
    assert!(config.receives() && !config.sends());

    let (config, _) = load(SENDER);
    assert_eq!(
        (config.role, config.ranks, config.listen.clone()),
        (Role::Sender, 1, None)
    );
    assert_eq!(config.id, "host-sender-7910");
    assert_eq!(
        config.proxy.as_ref().unwrap().engine_url,
        "http://127.0.0.1:8100"
    );
    assert!(config.sends() && !config.receives());

    // The connector computes the same path from the same variable.
    let inputs = inputs(SENDER, &[("XDG_RUNTIME_DIR", "/run/user/7/")], &[]);
    let (config, _) = Config::load(&inputs).unwrap();
    let socket = config.socket.to_str();
    assert_eq!(socket, Some("/run/user/7/pd-sidecar/sender.sock"));

    // A sidecar with both roles has one socket, which is named `both.sock`.
    let both = RECEIVER.replace("receiver", "both");
    let (config, _) = load(&both);
    assert!(config.sends() && config.receives());
    assert_eq!(
        config.socket.to_str(),
        Some("/tmp/pd-sidecar-1000/both.sock")
    );
}

#[test]
fn every_shipped_file_loads_without_a_warning() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs");
    let mut files = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let (_, report) = load(&text);
        assert_eq!(report.warnings, Vec::<String>::new(), "{}", path.display());
        assert_eq!(report.unknown, Vec::<String>::new(), "{}", path.display());
        files += 1;
    }
    assert!(files >= 2, "the prefiller's and the decoder's are shipped");
}

#[test]
fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
    let file = format!("{RECEIVER}sidecar: {{transport: nixl, id: f}}\n");
    let env = [
        ("PD_SIDECAR_TRANSPORT", "tcp"),
        ("LMCACHE_PD_BUFFER_SIZE", "2GiB"),
        ("PD_SIDECAR_ID", " "),
    ];
    let flags = [("--transport", "auto"), ("--buffer-size", "4GiB")];
    let rows = |inputs: &Inputs| {
        let (_, report) = Config::load(inputs).unwrap();
        [
            "pd_buffer_size",
            "sidecar.transport",
            "sidecar.id",
            "sidecar.push",
        ]
        .map(|key| {
            let row = report.rows.iter().find(|r| r.key == key).unwrap();
            format!("{} from {}", row.value, row.source)
        })
    };
    assert_eq!(
        rows(&inputs(&file, &env, &flags)),
        [
            "4294967296 (4 GiB) from flag --buffer-size",
            "auto from flag --transport",
            "f from x.yaml:8",
            "true from default"
        ]
    );
    assert_eq!(
        rows(&inputs(&file, &env, &[]))[..2],
        [
            "2147483648 (2 GiB) from environment LMCACHE_PD_BUFFER_SIZE",
            "tcp from environment PD_SIDECAR_TRANSPORT"
        ]
    );
    assert_eq!(
        rows(&inputs(&file, &[], &[]))[..2],
        ["1073741824 (1 GiB) from x.yaml:2", "nixl from x.yaml:8"]
    );
}

#[test]
fn old_names_and_their_variables_work() {
    let old = "\
enable_xpyd: yes
nixl_role: receiver
nixl_buffer_size: 1_073_741_824
nixl_buffer_device: cpu
nixl_peer_host: localhost
nixl_peer_init_port: 7300
nixl_peer_alloc_port: 7400
nixl_proxy_host: localhost
";
    let inputs = inputs(old, &[("LMCACHE_NIXL_PROXY_PORT", "7500")], &[]);
    let (config, report) = Config::load(&inputs).unwrap_or_else(|r| panic!("{}", r.errors()));
    assert_eq!(
        config.listen.unwrap().ranks,
        [RankPorts {
            init: 7300,
            alloc: 7400,
            query: None,
            tcp: 0
        }]
    );
    assert_eq!(config.proxy.unwrap().address.to_string(), "localhost:7500");
    assert_eq!(report.warnings.len(), 1, "{:?}", report.warnings);
    assert!(report.warnings[0].contains("nixl_buffer_device"));
}

#[test]
fn without_a_file_flags_and_variables_are_enough() {
    let inputs = Inputs {
        file: None,
        ..inputs(
            "",
            &[("LMCACHE_PD_PEER_ALLOC_PORT", "7400,7401")],
            &[
                ("--role", "receiver"),
                ("--host", "::1"),
                ("--init-port", "7300,7301"),
                ("--buffer-size", "64MiB"),
            ],
        )
    };
    let (config, report) = Config::load(&inputs).unwrap_or_else(|r| panic!("{}", r.errors()));
    assert_eq!(config.ranks, 2);
    assert_eq!(config.proxy, None);
    assert!(
        report.warnings[0].contains("no proxy"),
        "{:?}",
        report.warnings
    );
}

#[test]
fn unknown_keys_get_a_hint_or_are_let_be() {
    let file = format!("{SENDER}pd_bufer_size: 1\nfrobnicate: 1\nengine_url: 'http://x'\n");
    let report = Config::load(&inputs(&file, &[("PD_SIDECAR_TRANPORT", "tcp")], &[])).unwrap_err();
    let lines: Vec<_> = report.problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        [
            "x.yaml:4: pd_bufer_size = \"1\": no such key; did you mean pd_buffer_size?",
            "x.yaml:6: engine_url = \"http://x\": no such key; did you mean sidecar.engine_url?",
        ]
    );
    assert_eq!(report.unknown, ["frobnicate"]);
    assert_eq!(
        report.warnings,
        [
            "environment PD_SIDECAR_TRANPORT: no such key, ignored; did you mean PD_SIDECAR_TRANSPORT?"
        ]
    );
    let file = SENDER.replacen("proxy:", "frobnicate: 1, proxy:", 1);
    check(&file, &["x.yaml:3|sidecar.frobnicate|1|no such key"]);
}

#[test]
fn lmcaches_other_keys_are_ignored_with_a_reason() {
    let file = format!(
        "{SENDER}local_cpu: False\nremote_serde: NULL\nextra_config: {{a: 1}}\nenable_p2p: off\n"
    );
    let (_, report) = load(&file);
    let ignored: Vec<_> = report
        .ignored
        .iter()
        .map(|i| format!("{}={}", i.key, i.value))
        .collect();
    assert_eq!(
        ignored,
        ["local_cpu=False", "extra_config={a}", "enable_p2p=off"]
    );
    assert_eq!(report.unknown, Vec::<String>::new());
}

#[test]
fn lmcaches_times_stand_in_for_ours() {
    let base = format!("{SENDER}pd_allocation_timeout_sec: 2.5\npd_shutdown_timeout_sec: 3\n");
    let (config, report) = load(&base);
    assert_eq!(
        (
            config.times.wait.as_millis(),
            config.times.drain.as_millis()
        ),
        (2500, 3000)
    );
    let row = report
        .rows
        .iter()
        .find(|r| r.key == "sidecar.wait_ms")
        .unwrap();
    assert_eq!(
        (row.value.as_str(), row.source.as_str()),
        ("2500", "from pd_allocation_timeout_sec")
    );
    let (config, _) = load(&format!("{SENDER}pd_allocation_timeout_sec: .inf\n"));
    assert_eq!(
        (
            config.times.wait.as_millis(),
            config.times.drain.as_millis()
        ),
        (1000, 10_000)
    );
}

#[test]
fn machines_get_what_was_configured() {
    let layout = protocol::Layout {
        model: "m".to_owned(),
        dtype: "float".to_owned(),
        layers: 2,
        kv_heads: 2,
        head_size: 8,
        mla: false,
        chunk_tokens: 256,
        ..protocol::Layout::example()
    };
    let epoch = protocol::Epoch(7);
    let (config, _) = load(RECEIVER);
    let receiver = config.receiver_config(epoch, 40, &layout, None).unwrap();
    assert_eq!(
        (
            receiver.slots,
            receiver.max_quarantined,
            receiver.token_bytes
        ),
        (40, 10, 256)
    );
    assert_ne!(
        receiver.seed,
        config
            .receiver_config(epoch, 40, &layout, None)
            .unwrap()
            .seed
    );
    assert_eq!(config.rank_id(1), "host-receiver-7900/1");
    let (config, _) = load(&SENDER.replacen("proxy:", "push: off, stall_ms: 7s, proxy:", 1));
    let sender = config.sender_config(0, epoch, 3, layout);
    assert_eq!(
        (sender.id.as_str(), sender.push_off, sender.stall),
        ("host-sender-7910", true, Duration::from_secs(7))
    );
}

#[test]
fn the_report_reads_well_and_hides_nothing() {
    let (_, report) = Config::load(&inputs(
        SENDER,
        &[
            ("UCX_TLS", "sm"),
            ("HOME", "/root"),
            ("NIXL_PLUGIN_DIR", "/x"),
        ],
        &[],
    ))
    .unwrap();
    let text = report.to_string();
    assert!(text.starts_with("KEY"), "{text}");
    assert!(
        text.contains("\npd_role                     sender                            x.yaml:1\n"),
        "{text}"
    );
    assert!(text.contains("\n  UCX_TLS=sm\n"), "{text}");
    assert!(!text.contains("HOME"), "{text}");
    let json = report.json();
    assert_eq!(json["ok"], true);
    assert_eq!(json["passed_through"][0]["name"], "NIXL_PLUGIN_DIR");
    let all = Lmcache::KEYS.len() + Sidecar::KEYS.len();
    // The additional row is for UCX_MM_ERROR_HANDLING, which the environment does not set.
    assert_eq!(json["values"].as_array().unwrap().len(), all + 1);
}

#[test]
fn defaults_are_what_the_table_says() {
    for key in Lmcache::KEYS.iter().chain(Sidecar::KEYS) {
        assert!(!key.doc.is_empty(), "{}", key.path());
    }
    let (_, report) = load(SENDER);
    for key in Lmcache::KEYS.iter().chain(Sidecar::KEYS) {
        let row = report.rows.iter().find(|r| r.key == key.path()).unwrap();
        match key.default {
            Default::Value(_) => assert_eq!(row.source, "default", "{}", key.path()),
            Default::Computed(text)
                if !text.contains("quarter") && !text.contains("pd_peer_host") =>
            {
                assert_ne!(row.value, "-", "{}: {text}", key.path());
            }
            _ => {}
        }
    }
}

#[test]
fn docs_have_every_key() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/reference/configuration.md"
    );
    let text = std::fs::read_to_string(path).unwrap();
    let tables = super::reference();
    let lines: Vec<&str> = tables.lines().filter(|l| l.starts_with('|')).collect();
    assert!(lines.len() > 60, "{}", lines.len());
    for line in lines {
        assert!(
            text.lines().any(|l| l == line),
            "docs/reference/configuration.md lacks\n{line}\nrun `sidecar check-config --reference` and replace its tables"
        );
    }
    let known = |key: &Key, l: &str| l.starts_with(&format!("| `{}` |", key.path()));
    for line in text.lines().filter(|l| l.starts_with("| `sidecar.")) {
        assert!(
            Sidecar::KEYS.iter().any(|k| known(k, line)),
            "no such key any more: {line}"
        );
    }
}

/// Loading any file ends with a configuration or with mistakes, and each mistake has a text.
#[test]
fn damaged_files_never_panic() {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    const SCRAPS: &[&str] = &[
        "\n",
        ": ",
        "[",
        "]",
        "{",
        "}",
        "&a ",
        "*a",
        "<<: *a\n",
        "\"",
        "'",
        "- ",
        "#",
        "\t",
        "~",
        "0x",
        "1e999",
        "-1",
        ".inf",
        "\u{feff}",
        "é",
        "\0",
        "|\n",
        "? ",
        "!!int ",
        "%YAML 1.1\n---\n",
        "sidecar:\n  ",
        "0",
        "pd_role: both\n",
        "99999999999999999999",
        ",",
        "...\n",
        "GiB",
        ":",
    ];
    let mut rng = StdRng::seed_from_u64(7);
    let mut loaded = 0;
    for round in 0..500 {
        let mut text = [RECEIVER, SENDER][round % 2].to_owned();
        // Each random change replaces at most 8 bytes, so that the rest of the file still reaches the later
        // checks.
        for _ in 0..rng.random_range(1..6) {
            let at = (0..=text.len())
                .filter(|&i| text.is_char_boundary(i))
                .collect::<Vec<_>>();
            let from = at[rng.random_range(0..at.len())];
            let to = at[rng.random_range(0..at.len())].clamp(from, text.len().min(from + 8));
            let to = if text.is_char_boundary(to) { to } else { from };
            text.replace_range(from..to, SCRAPS[rng.random_range(0..SCRAPS.len())]);
        }
        match Config::load(&inputs(&text, &[], &[])) {
            Ok(_) => loaded += 1,
            Err(report) => {
                assert!(!report.problems.is_empty(), "{text}");
                assert!(report.problems.iter().all(|p| !p.what.is_empty()), "{text}");
            }
        }
    }
    assert!(loaded > 5, "some damage is harmless: {loaded}");
}
