use std::io::Write;

use clap::Parser;

use super::*;
use crate::config::cli::Config;

/// Returns `role connector url init alloc` of every instance.
fn named(flags: &[&str]) -> Result<Vec<String>, Vec<String>> {
    let config = Config::try_parse_from([&["pd-proxy"], flags].concat()).unwrap();
    let all = config.sources.named()?;
    let show = |i: &Instance| {
        format!(
            "{:?} {:?} {} {:?} {:?}",
            i.role, i.connector, i.http, i.init_ports, i.alloc_ports
        )
    };
    Ok(all.iter().map(show).collect())
}

#[test]
fn flags() {
    let check = |flags: &[&str], expect: &[&str]| {
        let expect: Vec<_> = expect.iter().map(|text| (*text).to_owned()).collect();
        assert_eq!(named(flags), Ok(expect), "{flags:?}");
    };
    check(&[], &[]);
    check(
        &["--prefill", "http://a:1,b:2", "--decode", "https://c:3"],
        &[
            "Prefill Nixl http://a:1 [] []",
            "Prefill Nixl http://b:2 [] []",
            "Decode Nixl https://c:3 [] []",
        ],
    );
    check(
        &[
            "--prefiller-host",
            "p",
            "--num-prefillers",
            "2",
            "--prefiller-port",
            "8100",
        ],
        &[
            "Prefill Lmcache http://p:8100 [] []",
            "Prefill Lmcache http://p:8101 [] []",
        ],
    );
    check(
        &[
            "--num-decoders",
            "2",
            "--decoder-init-port",
            "7300,7400",
            "--decoder-alloc-port",
            "7500,7600",
        ],
        &[
            "Decode Lmcache http://localhost:8200 [7300, 7400] [7500, 7600]",
            "Decode Lmcache http://localhost:8201 [7301, 7401] [7501, 7601]",
        ],
    );
    check(
        &[
            "--decoder-host",
            "d1,d2",
            "--decoder-port",
            "80",
            "--num-decoders",
            "2",
        ],
        &[
            "Decode Lmcache http://d1:80 [8300] [8400]",
            "Decode Lmcache http://d2:80 [8300] [8400]",
        ],
    );
    check(
        &["--decoder-host", "d1", "--decoder-port", "80,81"],
        &[
            "Decode Lmcache http://d1:80 [8300] [8400]",
            "Decode Lmcache http://d1:81 [8300] [8400]",
        ],
    );
}

#[test]
fn hosts_are_ipv6_too() {
    for host in ["::1", "[::1]"] {
        assert_eq!(
            named(&["--prefiller-host", host, "--decoder-host", host]).unwrap(),
            [
                "Prefill Lmcache http://[::1]:8100 [] []",
                "Decode Lmcache http://[::1]:8200 [8300] [8400]",
            ]
        );
    }
    for host in ["fe80::1%lo", "[fe80::1%lo]"] {
        assert_eq!(
            named(&["--prefiller-host", host, "--decoder-host", host]).unwrap(),
            [
                "Prefill Lmcache http://[fe80::1%lo]:8100 [] []",
                "Decode Lmcache http://[fe80::1%lo]:8200 [8300] [8400]",
            ]
        );
    }
    assert_eq!(
        named(&["--prefiller-host", "host%lo"]).unwrap_err().len(),
        1
    );
}

#[test]
fn problems_come_all_at_once() {
    let count = |flags: &[&str]| named(flags).unwrap_err().len();
    assert_eq!(count(&["--prefill", "ftp://x,http://u@h"]), 2);
    assert_eq!(count(&["--prefill", "a:1", "--decode", "a:1"]), 1);
    assert_eq!(count(&["--prefill", "a,a:0,a:99999,http://a:x"]), 4);
    assert_eq!(
        count(&["--decoder-host", "a,b", "--decoder-port", "1,2,3"]),
        1
    );
    assert_eq!(
        count(&["--prefiller-port", "65535", "--num-prefillers", "2"]),
        1
    );
    assert_eq!(
        count(&["--instances", "/nonexistent", "--env-file", "/nonexistent"]),
        2
    );
}

#[test]
fn files() {
    let mut yaml = tempfile::NamedTempFile::new().unwrap();
    yaml.write_all(
        b"instances:\n\
          - {role: prefill, url: 'http://p:1'}\n\
          - role: decode\n  url: http://d:2\n  id: d\n  connector: lmcache\n  init_ports: [1]\n  alloc_ports: [2]\n\
          - {role: prefill, url: 'http://n:3', connector: p2p-nccl, zmq: '10.0.0.1:21001'}\n",
    )
    .unwrap();
    let path = yaml.path().to_str().unwrap();
    assert_eq!(
        named(&["--instances", path]).unwrap(),
        [
            "Prefill Nixl http://p:1 [] []",
            "Decode Lmcache http://d:2 [1] [2]",
            "Prefill P2pNccl http://n:3 [] []",
        ]
    );
    let mut env = tempfile::NamedTempFile::new().unwrap();
    env.write_all(
        b"# two\nexport PREFILL_ENDPOINTS=\"a:1, b:2\"\nDECODE_ENDPOINTS=c:3\n\nodd line\n",
    )
    .unwrap();
    let path = env.path().to_str().unwrap();
    assert_eq!(named(&["--env-file", path]).unwrap().len(), 3);
    let decode = named(&["--env-file", path, "--decode", "x:1"]).unwrap();
    assert_eq!(decode[2], "Decode Nixl http://x:1 [] []");
    std::fs::write(env.path(), "DECODE_ENDPOINTS=c:3, # the large one\n").unwrap();
    assert_eq!(named(&["--env-file", path]).unwrap().len(), 1);
    std::fs::write(env.path(), "DECODE_ENDPOINT=c:3\n").unwrap();
    assert_eq!(named(&["--env-file", path]).unwrap_err().len(), 1);
    for bad in [
        "instances: [{role: prefill}]",
        "instances: [{role: decode, url: 'http://a', conector: nixl}]",
        "x: 1",
    ] {
        std::fs::write(yaml.path(), bad).unwrap();
        assert_eq!(
            named(&["--instances", yaml.path().to_str().unwrap()])
                .unwrap_err()
                .len(),
            1
        );
    }
}
