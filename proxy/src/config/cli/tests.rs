use super::*;

fn parse(flags: &[&str]) -> Result<Config, String> {
    Config::try_parse_from([&["pd-proxy"], flags].concat()).map_err(|e| e.to_string())
}

#[test]
fn defaults_have_no_problems() {
    assert_eq!(parse(&[]).unwrap().problems(), Vec::<String>::new());
}

#[test]
fn values() {
    let check = |flag: &str, value: &str, ok: bool| {
        assert_eq!(parse(&[flag, value]).is_ok(), ok, "{flag} {value}");
    };
    check("--idle-timeout", "0s", false);
    check("--idle-timeout", "5", false);
    check("--idle-timeout", "500ms", true);
    check("--drain-timeout", "48h", false);
    check("--max-in-flight", "0", false);
    check("--max-in-flight", "-1", false);
    check("--max-in-flight", "99999999999", false);
    check("--decode-attempts", "0", false);
    check("--listen", "8000", false);
    check("--listen", "[::1]:8000", true);
}

#[test]
fn call_backs_come_before_their_answers_are_too_old() {
    let problems = |value: &str| parse(&["--call-back-every", value]).unwrap().problems();
    assert_eq!(problems("10s"), Vec::<String>::new());
    for value in ["11s", "15s", "1h"] {
        let problems = problems(value);
        assert_eq!(problems.len(), 1, "{value}: {problems:?}");
        assert!(problems[0].contains("at most 10s"), "{problems:?}");
    }
}

#[test]
fn defaults_survive_long_answers() {
    let config = parse(&[]).unwrap();
    // An engine was silent for 32 s during a tool call of 17 KB, and for 62 s during a longer tool
    // call.
    assert!(config.idle_timeout >= Duration::from_secs(300));
    // An answer of 32,000 tokens at ten tokens per second takes 53 minutes.
    assert!(config.answer_timeout >= Duration::from_secs(3600));
}
