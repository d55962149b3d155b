//! Tests of the fetch port's address and of its default.

use super::*;

fn port(file: &str, env: &[(&str, &str)]) -> Option<(String, String, u16)> {
    let flags = [("--insecure", "on")];
    let (config, report) = Config::load(&inputs(file, env, &flags)).unwrap();
    assert!(
        report.warnings.iter().all(|w| w.starts_with("INSECURE")),
        "{report:?}"
    );
    let fetch = config.fetch?;
    Some((fetch.host, fetch.advertise, fetch.port))
}

fn at(host: &str, advertise: &str, port: u16) -> Option<(String, String, u16)> {
    Some((host.to_owned(), advertise.to_owned(), port))
}

#[test]
fn a_sidecar_that_an_engine_starts_has_a_fetch_port_for_this_machine() {
    let spawned = [("PD_SIDECAR_SPAWNED", "1")];
    assert_eq!(port(SENDER, &[]), None);
    assert_eq!(port(SENDER, &spawned), at("127.0.0.1", "127.0.0.1", 0));
    assert_eq!(port(RECEIVER, &spawned), None);
    let both = RECEIVER.replace("receiver", "both");
    assert_eq!(port(&both, &spawned), at("127.0.0.1", "127.0.0.1", 0));
    let reachable = both.replacen("127.0.0.1", "10.0.0.2", 1);
    assert_eq!(port(&reachable, &spawned), None);
}

#[test]
fn a_configured_fetch_port_is_used() {
    let spawned = [("PD_SIDECAR_SPAWNED", "1")];
    let sender = SENDER.replace("{proxy", "{fetch_port: 7600, proxy");
    assert_eq!(port(&sender, &[]), at("127.0.0.1", "127.0.0.1", 7600));
    assert_eq!(port(&sender, &spawned), at("127.0.0.1", "127.0.0.1", 7600));
    let other = format!("{sender}pd_peer_host: 10.0.0.2\n");
    assert_eq!(port(&other, &[]), at("10.0.0.2", "10.0.0.2", 7600));
    check(
        &other,
        &["x.yaml:3|sidecar.fetch_port|7600|it listens beyond this machine, and peers need no key"],
    );
    let wildcard = format!("{sender}pd_peer_host: 0.0.0.0\n");
    check(
        &wildcard,
        &["x.yaml:4|pd_peer_host|0.0.0.0|decode sides cannot connect to a wildcard address"],
    );
}

#[test]
fn no_other_key_names_a_fetch_port() {
    let both = RECEIVER.replace("receiver", "both");
    let with =
        |port: u16| format!("{both}sidecar: {{fetch_port: {port}, admin: '127.0.0.1:7900'}}\n");
    for (port, what) in [
        (
            7400,
            "rank 0 would have port 7400, which pd_peer_alloc_port names",
        ),
        (
            7399,
            "rank 1 would have port 7400, which pd_peer_alloc_port names",
        ),
        (
            7301,
            "rank 0 would have port 7301, which pd_peer_init_port names",
        ),
        (
            7899,
            "rank 1 would have port 7900, which sidecar.admin names",
        ),
        (65535, "the port of rank 1 would be above 65535"),
    ] {
        check(
            &with(port),
            &[&format!("x.yaml:8|sidecar.fetch_port|{port}|{what}")],
        );
    }
    let sender = SENDER.replace("{proxy", "{ranks: 3, fetch_port: 7908, proxy");
    check(
        &sender,
        &[
            "x.yaml:3|sidecar.fetch_port|7908|rank 2 would have port 7910, which sidecar.admin names",
        ],
    );
    load(&with(7600));
}

#[test]
fn a_sidecar_with_a_fetch_port_needs_no_proxy_and_no_advice_about_variables_of_its_engine() {
    let alone = RECEIVER.replace("receiver", "both");
    let alone = &alone[..alone.find("pd_proxy_host").unwrap()];
    let env = [
        ("PD_SIDECAR_SPAWNED", "1"),
        ("PD_SIDECAR_BINARY", "sidecar"),
    ];
    let (_, report) = Config::load(&inputs(alone, &env, &[])).unwrap();
    assert!(report.warnings.is_empty(), "{report:?}");
    let (_, report) = Config::load(&inputs(alone, &[], &[])).unwrap();
    assert!(report.warnings[0].contains("no proxy"), "{report:?}");
}
