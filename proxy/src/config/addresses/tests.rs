use clap::Parser;

use crate::config::cli::Config;

fn parse(flags: &[&str]) -> Result<Config, String> {
    Config::try_parse_from([&["pd-proxy"], flags].concat()).map_err(|e| e.to_string())
}

#[test]
fn names_and_parts() {
    let check = |flags: &[&str], listen: &str, registration: &str| {
        let addresses = parse(flags).unwrap().addresses;
        let text = (
            addresses.listen().to_string(),
            addresses.registration().to_string(),
        );
        assert_eq!(
            text,
            (listen.to_owned(), registration.to_owned()),
            "{flags:?}"
        );
    };
    check(&[], "127.0.0.1:8000", "127.0.0.1:7500");
    check(
        &["--listen", "localhost:1"],
        "127.0.0.1:1",
        "127.0.0.1:7500",
    );
    check(&["--listen", "[::1]:1"], "[::1]:1", "127.0.0.1:7500");
    check(&["--port", "9100"], "127.0.0.1:9100", "127.0.0.1:7500");
    let lmcache = [
        "--host",
        "localhost",
        "--port",
        "9100",
        "--proxy-host",
        "0.0.0.0",
        "--proxy-port",
        "7501",
    ];
    check(&lmcache, "127.0.0.1:9100", "0.0.0.0:7501");
    check(&["--host", "::1"], "[::1]:8000", "127.0.0.1:7500");
    check(&["--host", "[::1]"], "[::1]:8000", "127.0.0.1:7500");
    let error = parse(&["--listen", "::1:8000"]).unwrap_err().to_string();
    assert!(error.contains("[ADDRESS]:PORT"), "{error}");
    for wrong in ["8000", "127.0.0.1", "nobody.invalid:1", ""] {
        assert!(parse(&["--listen", wrong]).is_err(), "{wrong}");
    }
    assert!(parse(&["--host", "nobody.invalid"]).is_err());
}

#[test]
fn off_loopback_needs_a_word() {
    let both = ["--listen", "0.0.0.0:8000", "--proxy-host", "10.0.0.1"];
    assert_eq!(parse(&both).unwrap().problems().len(), 2);
    // Each port that needs a key may listen anywhere.
    let both = [&both[..], &["--api-key", "k"]].concat();
    let problems = parse(&both).unwrap().problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].contains("set --auth require with --key-file"),
        "{problems:?}"
    );
    let keyed = [&both[..], &["--auth", "require"]].concat();
    let open = |flags: &[&str]| {
        let mut problems = parse(flags).unwrap().problems();
        problems.retain(|problem| problem.contains("loopback"));
        problems
    };
    assert_eq!(open(&keyed), Vec::<String>::new());
    let p2p = [&keyed[..], &["--p2p-registration", "10.0.0.1:30001"]].concat();
    let problems = open(&p2p);
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].contains("P2P NCCL instances there prove no key"),
        "{problems:?}"
    );
    let prefer = [&both[..], &["--auth", "prefer"]].concat();
    assert_eq!(open(&prefer).len(), 1);
    let with_word = [&both[..], &["--insecure"]].concat();
    assert_eq!(parse(&with_word).unwrap().problems(), Vec::<String>::new());
    let same = ["--port", "7500"];
    assert_eq!(parse(&same).unwrap().problems().len(), 1);
}
