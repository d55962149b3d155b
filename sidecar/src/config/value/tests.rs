use common::host::is_loopback;

use super::*;
use crate::transport::table::Choice;

/// Checks the result of reading `raw`. An expectation that begins with `!` is the error's text.
fn check<T: Value>(raw: &Raw, expect: &str) {
    let mut notes = Vec::new();
    let shown = match T::read(raw, &mut notes) {
        Ok(value) => value.show(),
        Err(what) => format!("!{what}"),
    };
    let notes: String = notes.iter().map(|n| format!(" ({n})")).collect();
    assert_eq!(format!("{shown}{notes}"), expect, "{raw:?}");
}

fn yaml<T: Value>(text: &str, expect: &str) {
    let entries = super::super::yaml::parse(&format!("k: {text}\n")).expect(text);
    check::<T>(&entries[0].value.raw, expect);
}

fn outside<T: Value>(text: &str, expect: &str) {
    check::<T>(&Raw::outside(text), expect);
}

#[test]
fn whole_numbers_in_every_yaml_spelling() {
    yaml::<Count<0>>("1073741824", "1073741824");
    yaml::<Count<0>>("1_073_741_824", "1073741824");
    yaml::<Count<0>>("1e9", "1000000000");
    yaml::<Count<0>>("1.5e3", "1500");
    yaml::<Count<0>>("0x10", "16");
    yaml::<Count<0>>("0o17", "15");
    yaml::<Count<0>>("+5", "5");
    yaml::<Count<0>>(
        "017",
        "15 (`017` is octal in YAML 1.1, which LMCache reads, so the value is 15; write 15 or 0o17)",
    );
    yaml::<Count<0>>("'017'", "17");
    outside::<Count<0>>("017", "17");
    yaml::<Count<0>>("018", "!a leading 0 makes it octal in YAML 1.1");
    yaml::<Count<0>>("0", "0");
    yaml::<Count<1>>("0", "!less than 1");
    yaml::<Count<0>>("-1", "!negative");
    yaml::<Count<0>>("1.5", "!not a whole number");
    yaml::<Count<0>>("1e10", "!too large");
    yaml::<Count<0>>("1e400", "!not a whole number");
    yaml::<Count<0>>("99999999999999999999999", "!too large");
    yaml::<Count<0>>("twelve", "!not a whole number");
    yaml::<Count<0>>("[1]", "!a list");
    yaml::<Count<0>>("{a: 1}", "!a mapping");
    outside::<Count<0>>("", "!not a number");
}

#[test]
fn truth_values() {
    for yes in ["true", "True", "yes", "on", "ON", "1", "'true'"] {
        yaml::<bool>(yes, "true");
    }
    for no in ["false", "no", "Off", "0", "n"] {
        yaml::<bool>(no, "false");
    }
    yaml::<bool>("2", "!neither true nor false");
    yaml::<bool>("maybe", "!neither true nor false");
}

#[test]
fn sizes_with_and_without_units() {
    outside::<Bytes>("4GiB", "4294967296 (4 GiB)");
    outside::<Bytes>("4 gib", "4294967296 (4 GiB)");
    outside::<Bytes>("512Mi", "536870912 (512 MiB)");
    outside::<Bytes>("1.5GB", "1500000000");
    outside::<Bytes>("0.5KiB", "512");
    yaml::<Bytes>("1_073_741_824", "1073741824 (1 GiB)");
    yaml::<Bytes>("1e9", "1000000000");
    yaml::<Bytes>("4G", "!`G` may mean GiB or GB");
    yaml::<Bytes>("4 potatoes", "!not a unit: `potatoes`");
    yaml::<Bytes>("99999999999TiB", "!too large");
    yaml::<Bytes>("0.1B", "!not a whole number");
    yaml::<Bytes>("GiB", "!not a number");
    yaml::<Bytes>("-4GiB", "!not a whole number");
}

#[test]
fn times() {
    outside::<Millis>("1000", "1000");
    outside::<Millis>("5s", "5000");
    outside::<Millis>("250ms", "250");
    outside::<Millis>("1.5s", "1500");
    outside::<Millis>("2m", "120000");
    outside::<Millis>("25h", "!more than a day");
    outside::<Millis>("5 parsecs", "!not a unit: `parsecs`");
    outside::<Millis>("-1", "!negative");
    outside::<Seconds>("5.0", "5");
    outside::<Seconds>("0.005", "0.005");
    yaml::<Seconds>(".inf", "inf");
    yaml::<Seconds>("inf", "inf");
    outside::<Seconds>("nan", "!not a time from 0 to 86400 s");
    outside::<Seconds>("-1", "!not a time from 0 to 86400 s");
    outside::<Seconds>("soon", "!not a number");
}

#[test]
fn ports_one_or_many() {
    yaml::<Ports>("7300", "[7300]");
    yaml::<Ports>("[7300, 7301]", "[7300, 7301]");
    yaml::<Ports>("\"7300,7301\"", "[7300, 7301]");
    outside::<Ports>("7300, 7301", "[7300, 7301]");
    outside::<Ports>("[7300,7301]", "[7300, 7301]");
    yaml::<Ports>("[7_300]", "[7300]");
    yaml::<Ports>("[]", "!empty");
    yaml::<Ports>("0", "!no port");
    yaml::<Ports>("65536", "!no port");
    yaml::<Ports>("[[7300]]", "!a list");
    outside::<Ports>("7300,", "!not a number");
    outside::<Ports>(&vec!["1"; 65].join(","), "!more than 64 ranks");
    outside::<Port>("0", "0");
    outside::<Port>("70000", "!no port");
}

#[test]
fn addresses() {
    outside::<HostPort>("127.0.0.1:7500", "127.0.0.1:7500");
    outside::<HostPort>("tcp://proxy.svc:7500", "proxy.svc:7500");
    outside::<HostPort>("[::1]:7500", "[::1]:7500");
    outside::<HostPort>("tcp://[fe80::1%eth0]:7500", "[fe80::1%eth0]:7500");
    outside::<HostPort>("[10.0.0.1%eth0]:7500", "!not a host name");
    outside::<HostPort>("::1:7500", "!an IPv6 address without brackets");
    outside::<HostPort>("proxy", "!no port");
    outside::<HostPort>("proxy:http", "!`http` is not a port");
    outside::<HostPort>(":7500", "!empty");
    outside::<Host>("10.0.0.2", "10.0.0.2");
    outside::<Host>("[::1]", "::1");
    outside::<Host>("fe80::1%eth0", "fe80::1%eth0");
    outside::<Host>("[fe80::1%3]", "fe80::1%3");
    outside::<Host>("fe80::1%", "!with a port");
    outside::<Url>("http://[::1]:8100/", "http://[::1]:8100");
    outside::<Url>("http://[fe80::1%eth0]:8100", "http://[fe80::1%eth0]:8100");
    outside::<Url>("http://::1:8100", "!an IPv6 address without brackets");
    outside::<Host>("10.0.0.2:7300", "!with a port");
    outside::<Host>("http://x", "!a URL");
    outside::<Host>("a b", "!not a host name");
    outside::<Url>("http://127.0.0.1:8100/", "http://127.0.0.1:8100");
    outside::<Url>("127.0.0.1:8100", "!neither http:// nor https://");
    outside::<Url>(
        "http://a?b",
        "!not a base URL: it has no host, or has a query, a fragment, an @ or white space",
    );
    for (host, loopback, wildcard) in [
        ("localhost", true, false),
        ("127.9.9.9", true, false),
        ("::1", true, false),
        ("0.0.0.0", false, true),
        ("::", false, true),
        ("*", false, true),
        ("10.0.0.2", false, false),
        ("gpu-7", false, false),
    ] {
        assert_eq!(
            (is_loopback(host), is_wildcard(host)),
            (loopback, wildcard),
            "{host}"
        );
    }
}

#[test]
fn words_and_lists_of_them() {
    outside::<Role>("Sender", "sender");
    outside::<Role>("both", "both");
    outside::<Role>("prefill", "!not one of the possible values");
    outside::<Choice>("AUTO", "auto");
    outside::<Words>("UCX,POSIX", "[UCX, POSIX]");
    yaml::<Words>("[UCX]", "[UCX]");
    yaml::<Words>("[UCX, '']", "!an empty name");
    outside::<String>("  x ", "x");
    outside::<String>(" ", "!empty");
}
