//! Tests of the binary's command line: exit codes, standard output, standard error and their text.

use std::process::{Command, Output};

fn sidecar(arguments: &[&str], env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sidecar"))
        .args(arguments)
        .env_clear()
        .envs(env.iter().copied())
        .output()
        .expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

const DECODER: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../configs/lmcache-decoder-config.yaml"
);

#[test]
fn exit_codes_and_streams() {
    for (arguments, code, out, err) in [
        (&["--help"][..], 0, "Precedence:", ""),
        (&["-h"], 0, "Usage:", ""),
        (&["--version"], 0, "protocol 1", ""),
        (&["check-config", DECODER], 0, "sidecar.socket", ""),
        (
            &["check-config", "--reference"],
            0,
            "## Keys below `sidecar:`",
            "",
        ),
        (&["--frobnicate"], 64, "", "unexpected argument"),
        (
            &["check-config", "/nowhere.yaml"],
            64,
            "",
            "cannot read /nowhere.yaml",
        ),
        (
            &["check-config", DECODER, "--role", "x"],
            64,
            "KEY",
            "flag --role: pd_role = \"x\"",
        ),
        (
            &["--config", DECODER, "--host", "10.0.0.2"],
            64,
            "",
            "--insecure",
        ),
        (&[], 64, "", "pd_role: missing"),
    ] {
        let output = sidecar(arguments, &[]);
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{arguments:?} {stderr}");
        assert!(stdout.contains(out), "{arguments:?} {stdout}");
        assert!(stderr.contains(err), "{arguments:?} {stderr}");
        assert_eq!(stderr.is_empty(), err.is_empty(), "{arguments:?} {stderr}");
    }
}

#[test]
fn the_environment_names_the_file_and_beats_it() {
    let env = [
        ("LMCACHE_CONFIG_FILE", DECODER),
        ("LMCACHE_PD_BUFFER_SIZE", "64MiB"),
        ("UCX_TLS", "sm"),
    ];
    let output = sidecar(&["check-config", "--json"], &env);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let values = report["values"].as_array().expect("a list");
    let buffer = values
        .iter()
        .find(|v| v["key"] == "pd_buffer_size")
        .expect("listed");
    assert_eq!(buffer["value"], "67108864 (64 MiB)");
    assert_eq!(buffer["source"], "environment LMCACHE_PD_BUFFER_SIZE");
    assert_eq!(report["passed_through"][0]["name"], "UCX_TLS");
    assert_eq!(report["errors"], serde_json::json!([]));
}

/// Checks that the process does not panic if its output pipe closes early, as with `| head`.
#[test]
fn a_closed_pipe_is_no_crash() {
    let shell = format!(
        "'{}' check-config '{DECODER}' | head -n 1; exit ${{PIPESTATUS[0]}}",
        env!("CARGO_BIN_EXE_sidecar")
    );
    let output = Command::new("bash")
        .args(["-c", &shell])
        .output()
        .expect("bash");
    assert_eq!(text(&output.stderr), "");
}
