use super::*;

fn parse(line: &str) -> Result<Command, String> {
    Cli::try_parse_from(line.split_whitespace())
        .map(|cli| cli.command.unwrap_or(Command::Run(cli.run)))
        .map_err(|e| e.kind().to_string())
}

#[test]
fn the_definition_holds_together() {
    Cli::command().debug_assert();
}

#[test]
fn no_subcommand_runs() {
    for line in [
        "sidecar --role sender --config a.yaml",
        "sidecar run --role sender --config a.yaml",
    ] {
        let Ok(Command::Run(run)) = parse(line) else {
            panic!("{line}");
        };
        assert_eq!(run.config, Some(PathBuf::from("a.yaml")));
        assert_eq!(run.overrides.flags(), [("--role", "sender".to_owned())]);
    }
}

#[test]
fn switches_stand_for_values() {
    let Ok(Command::Run(run)) = parse("sidecar --insecure --no-push") else {
        panic!();
    };
    let on_off = [
        ("--insecure", "on".to_owned()),
        ("--no-push", "off".to_owned()),
    ];
    assert_eq!(run.overrides.flags(), on_off);
}

#[test]
fn subcommands_take_their_flags() {
    let Ok(Command::CheckConfig(check)) = parse("sidecar check-config a.yaml --json --host h")
    else {
        panic!();
    };
    assert_eq!(
        (check.file, check.json),
        (Some(PathBuf::from("a.yaml")), true)
    );
    let Ok(Command::Selftest(test)) =
        parse("sidecar selftest --seconds 3 --transport tcp --chunk-bytes 2MiB")
    else {
        panic!();
    };
    assert_eq!(
        (test.seconds, test.transport, test.chunk_bytes),
        (3, Choice::named("tcp").unwrap(), 2 << 20)
    );
    for line in [
        "sidecar selftest --seconds 0",
        "sidecar selftest --transport pigeon",
        "sidecar selftest --chunk-bytes 1G",
        "sidecar --frobnicate",
        "sidecar frobnicate",
    ] {
        assert!(parse(line).is_err(), "{line}");
    }
}

#[test]
fn every_flag_overrides_a_key_and_every_key_with_a_flag_has_one() {
    let mut in_help: Vec<String> = Cli::command()
        .get_arguments()
        .filter_map(|a| a.get_long().map(|l| format!("--{l}")))
        .filter(|l| !["--config", "--help", "--version"].contains(&l.as_str()))
        .collect();
    in_help.sort();
    let mut in_table = crate::config::flags();
    in_table.sort_unstable();
    assert_eq!(in_help, in_table);
}

#[test]
fn the_help_teaches_and_its_examples_parse() {
    let help = Cli::command().render_long_help().to_string();
    for word in [
        "Precedence",
        "Exit codes",
        "selftest",
        "check-config",
        "LMCACHE_<KEY>",
    ] {
        assert!(help.contains(word), "{word}");
    }
    let joined = TEACHING.replace("\\\n", " ");
    let examples: Vec<_> = joined
        .lines()
        .filter(|l| l.trim().starts_with("sidecar "))
        .collect();
    assert_eq!(examples.len(), 10);
    for example in examples {
        assert!(parse(example).is_ok(), "{example}");
    }
    for exit in [
        Exit::Ok,
        Exit::Warnings,
        Exit::Errors,
        Exit::Usage,
        Exit::Unavailable,
        Exit::Internal,
        Exit::Temporary,
    ] {
        assert!(
            TEACHING.contains(&format!("{:>4}  ", exit as u8)),
            "{exit:?}"
        );
    }
}

#[test]
fn the_version_names_the_protocol() {
    assert!(
        LONG_VERSION.contains(&format!("protocol {}", protocol::VERSION)),
        "{}",
        *LONG_VERSION
    );
}
