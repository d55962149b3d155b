//! Tests of the binary: flags, exit codes, signals.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};

const BINARY: &str = env!("CARGO_BIN_EXE_pd-proxy");

fn run(flags: &[&str]) -> Output {
    Command::new(BINARY).args(flags).output().unwrap()
}

/// Starts the binary on free ports, waits for its first log line, and closes the log's pipe: an earlier
/// version of the proxy ended when its log was closed.
fn start(flags: &[&str]) -> (Child, String) {
    let mut child = Command::new(BINARY)
        .args(["--listen", "127.0.0.1:0", "--registration", "127.0.0.1:0"])
        .args(flags)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    let line = log.lines().next().expect("a first line").unwrap();
    (child, line)
}

fn stop(mut child: Child, signal: &str) -> i32 {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args([signal, &pid]).status().unwrap();
    assert!(sent.success());
    child.wait().unwrap().code().expect("it exits by itself")
}

#[test]
fn signals_drain() {
    for signal in ["-TERM", "-INT"] {
        let (child, line) = start(&[]);
        assert!(line.contains("pd-proxy is up"), "{line}");
        assert_eq!(stop(child, signal), 0, "{signal}");
    }
    let (child, line) = start(&["--log-format", "json"]);
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["message"], "pd-proxy is up");
    assert!(
        line["registration"]
            .as_str()
            .unwrap()
            .starts_with("127.0.0.1:"),
        "{line}"
    );
    assert_eq!(stop(child, "-TERM"), 0);
}

/// Kubernetes sets variables of this form in every pod, for each service of the namespace.
#[test]
fn variables_of_kubernetes_services_stop_no_start() {
    let start = |value: &str| {
        let mut command = Command::new(BINARY);
        command.args(["--listen", "127.0.0.1:0", "--registration", "127.0.0.1:0"]);
        for name in [
            "PREFILLER_PORT",
            "DECODER_PORT",
            "DECODER_INIT_PORT",
            "DECODER_ALLOC_PORT",
        ] {
            command.env(format!("PD_PROXY_{name}"), value);
        }
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut child = start("tcp://10.0.0.1:8100");
    let log = BufReader::new(child.stderr.take().unwrap());
    let mut lines = Vec::new();
    for line in log.lines().map(Result::unwrap) {
        let up = line.contains("pd-proxy is up");
        lines.push(line);
        if up {
            break;
        }
    }
    let noted = |line: &&String| {
        line.contains("=tcp://10.0.0.1:8100: ignored, because it describes a Kubernetes service")
    };
    assert_eq!(lines.iter().filter(noted).count(), 4, "{lines:#?}");
    assert_eq!(stop(child, "-TERM"), 0);
    for value in ["tcp://10.0.0.1", "http://10.0.0.1:8100"] {
        assert_eq!(start(value).wait().unwrap().code(), Some(64), "{value}");
    }
}

#[test]
fn flags() {
    let check = |flags: &[&str], code: i32, words: &[&str]| {
        let output = run(flags);
        assert_eq!(output.status.code(), Some(code), "{flags:?}");
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        for word in words {
            assert!(
                text.contains(word),
                "{flags:?} says nothing of {word:?}:\n{text}"
            );
        }
    };
    check(&["--version"], 0, &["pd-proxy ", env!("CARGO_PKG_VERSION")]);
    check(
        &["--help"],
        0,
        &["--registration", "curl", "Exit codes", "PD_PROXY_LISTEN"],
    );
    check(&["--bogus"], 64, &["--bogus"]);
    check(
        &["--idle-timeout", "0s"],
        64,
        &["idle-timeout", "above zero"],
    );
    check(
        &[
            "--listen",
            "0.0.0.0:1",
            "--registration",
            "0.0.0.0:2",
            "--log",
            "==",
        ],
        64,
        &[
            "--listen 0.0.0.0:1",
            "--registration 0.0.0.0:2",
            "--insecure",
            "--log ==",
        ],
    );
}

#[test]
fn what_is_wrong_is_said_at_once() {
    let yaml = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(yaml.path(), "instances: [{role: decoder, url: 'a:1'}]").unwrap();
    let yaml = yaml.path().to_str().unwrap();
    let missing = "/nonexistent/file";
    let output = run(&[
        "--instances",
        yaml,
        "--env-file",
        missing,
        "--prefill",
        "ftp://x",
        "--decode",
        "http://y:99999",
        "--tls-cert",
        missing,
        "--tls-key",
        missing,
        "--tls-ca",
        yaml,
        "--allow",
        "a:1",
        "--etcd",
        "nowhere",
        "--host",
        "0.0.0.0",
    ]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(64), "{text}");
    for word in [
        "decoder",
        "--env-file /nonexistent/file",
        "ftp://x",
        "http://y:99999",
        "--tls-cert /nonexistent/file",
        "--tls-ca",
        "--allow",
        "--etcd",
        "--listen 0.0.0.0:8000",
    ] {
        assert!(text.contains(word), "nothing of {word:?}:\n{text}");
    }
}

#[test]
fn the_environment() {
    // Compose files set variables to an empty text, and set switches to 1.
    let output = Command::new(BINARY)
        .args(["--registration", "127.0.0.1:0", "--listen", "192.0.2.1:1"])
        .env("PREFILL_ENDPOINTS", "")
        .env("DECODE_ENDPOINTS", "127.0.0.1:1,")
        .env("PD_PROXY_INSECURE", "1")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    // No host has this address. The exit code says that only binding failed, so the variables were accepted.
    assert_eq!(output.status.code(), Some(69), "{text}");
}

#[test]
fn as_many_files_as_there_may_be() {
    let command = format!(
        "ulimit -Sn 64; exec {} --listen 127.0.0.1:0 --registration 127.0.0.1:0",
        BINARY
    );
    let mut child = Command::new("sh")
        .args(["-c", &command])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = BufReader::new(child.stderr.take().unwrap());
    log.lines().next().expect("a first line").unwrap();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let words: Vec<_> = files.unwrap().split_whitespace().collect();
    assert_eq!(words[3], words[4], "{words:?}");
    assert_eq!(stop(child, "-TERM"), 0);
}

#[test]
fn ports_in_use() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    for (flag, other, word) in [
        ("--listen", "--registration", "HTTP port"),
        ("--registration", "--listen", "registration port"),
    ] {
        let output = run(&[flag, &taken, other, "127.0.0.1:0"]);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(69), "{text}");
        assert!(text.contains(word) && text.contains(&taken), "{text}");
    }
    drop(holder);
}
