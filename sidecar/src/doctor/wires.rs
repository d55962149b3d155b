//! The rate of each wire of this host.
//!
//! Each measurement is a self-test in a process of its own: a library that ends its process then ends only the
//! measurement, and UCX reads its variables anew.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use protocol::dlist::Memory;
use serde::Deserialize;

use super::finding::{Rate, Results, kinds};
use super::subject::Subject;
use super::ucx_log::UcxLog;
use crate::memory::cuda;
use crate::selftest::{CONSENT_VARIABLE, Directory};
use crate::transport::Kind;
use crate::transport::expected_rate::{Ends, ExpectedRate};
use crate::transport::table::Choice;

kinds! {
    FAILS = Error "wire-fails":
        "the transport is there, but moves no bytes on this host";
        "read the error; `sidecar selftest --transport NAME` repeats the measurement, and sidecar.transport can exclude \
         this transport";
    WRONG = Error "wire-wrong-bytes":
        "bytes that arrive changed are wrong KV";
        "do not use this transport (sidecar.transport); report the fault, and check the host's memory";
    SLOW = Warning "wire-slow":
        "the wire is slower than even the slowest wire of its kind, so it takes another way than you expect";
        "docs/troubleshooting.md explains the causes in the section `Transfers are slow`";
    UNUSED_VARIABLE = Warning "ucx-variable-unknown":
        "UCX ignores variables that it does not know, so the setting has no effect";
        "correct the name of the variable, or remove it";
}

/// Measures each wire with each kind of memory that the configuration allows. `seconds` is the time for each.
pub(super) fn measure(
    subject: &Subject<'_>,
    seconds: u64,
    progress: &dyn Fn(&str),
    results: &mut Results,
) {
    let wanted = subject
        .config
        .map_or(Choice::Auto, |config| config.transport);
    let mut variables = Vec::new();
    for memory in memories(subject) {
        for kind in wanted.kinds() {
            let fits = memory == Memory::Vram || !kind.needs_gpu();
            let loads = kind.library().is_none_or(|loaded| loaded.is_ok());
            if !fits || !loads {
                continue;
            }
            progress(&format!(
                "measuring {kind} with buffers in {} for {seconds} s ...",
                word(memory)
            ));
            let mut outcome = run(subject, kind, memory, seconds);
            if outcome.is_err() {
                // The self-test has short time limits, which a busy host can miss once.
                progress("no result: measuring once more ...");
                outcome = run(subject, kind, memory, seconds);
            }
            match outcome {
                Ok((reports, log)) => {
                    judge(kind, memory, &reports, &log, results);
                    variables.extend(log.unknown_variables);
                }
                Err(error) => {
                    results.add(
                        &FAILS,
                        format!("{kind} with buffers in {}: {error}", word(memory)),
                    );
                }
            }
        }
    }
    variables.sort();
    variables.dedup();
    for variable in variables {
        results.add(&UNUSED_VARIABLE, format!("UCX does not know {variable}"));
    }
}

/// Returns the kinds of memory to measure.
fn memories(subject: &Subject<'_>) -> Vec<Memory> {
    match subject.config {
        Some(_) if subject.wants_gpu() => vec![Memory::Vram],
        Some(_) => vec![Memory::Dram],
        None if cuda::is_present() => vec![Memory::Dram, Memory::Vram],
        None => vec![Memory::Dram],
    }
}

/// The row of a self-test's report, as far as it is needed here.
#[derive(Debug, Deserialize)]
struct Report {
    memory: String,
    requests: usize,
    wrong: u64,
    push_gb_s: f64,
    wire_gb_s: f64,
}

fn judge(kind: Kind, memory: Memory, reports: &[Report], log: &UcxLog, results: &mut Results) {
    let ends = Ends {
        ours: memory,
        theirs: memory,
        same_host: true,
    };
    let expected = ExpectedRate::of(kind, ends);
    if kind.uses_ucx() && !log.library.is_empty() {
        results.fact("libraries", log.library.clone());
    }
    for report in reports {
        let rate = if report.wire_gb_s > 0.0 {
            report.wire_gb_s
        } else {
            report.push_gb_s
        };
        if report.wrong > 0 {
            let seen = format!(
                "{kind} from {}: {} chunks arrived changed",
                report.memory, report.wrong
            );
            results.add(&WRONG, seen);
        }
        if report.requests == 0 {
            results.add(
                &FAILS,
                format!("{kind} from {}: no request ended in time", report.memory),
            );
            continue;
        }
        let moves = format!("{kind} from {} moves {rate:.2} GB/s", report.memory);
        let rate = Rate {
            transport: kind.to_string(),
            memory: report.memory.clone(),
            gb_per_s: rate,
            at_least_gb_per_s: expected.least_gb_s,
            route: if kind.uses_ucx() {
                log.route.clone()
            } else {
                String::new()
            },
        };
        results.rate(&SLOW, &moves, expected.hint, rate);
    }
}

/// Runs one self-test. Returns its report and UCX's log.
fn run(
    subject: &Subject<'_>,
    kind: Kind,
    memory: Memory,
    seconds: u64,
) -> Result<(Vec<Report>, UcxLog), String> {
    let failed = |error: std::io::Error| format!("cannot start the measurement: {error}");
    let folder = Directory::new().map_err(failed)?;
    let mut command = Command::new("/proc/self/exe");
    command.args([
        "selftest",
        "--json",
        "--transport",
        kind.as_str(),
        "--buffer-device",
        word(memory),
    ]);
    command.args(["--seconds", &seconds.to_string()]);
    if memory == Memory::Dram {
        // The self-test fills host memory on the thread that also moves the messages. With a larger buffer, a busy host
        // fills it for longer than a lease lasts.
        command.args(["--buffer-size", "16MiB"]);
    }
    if let Some(config) = subject.config {
        for (name, value) in &config.ucx.variables {
            if subject.variable(name).is_none() {
                command.env(name, value);
            }
        }
        if config.ucx.tcp_host.is_some() {
            command.env(CONSENT_VARIABLE, "trusted");
        }
    }
    if subject.variable(LOG_LEVEL).is_none() {
        command.env(LOG_LEVEL, "info");
        command.env("UCX_LOG_FILE", folder.path.join("ucx.%p.log"));
    }
    let output = fs::File::create(folder.path.join(OUTPUT)).map_err(failed)?;
    let errors = fs::File::create(folder.path.join(ERRORS)).map_err(failed)?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors);
    let child = command.spawn().map_err(failed)?;
    let ended = wait(child, Duration::from_secs(seconds) + START);
    let log = UcxLog::read(&folder.path);
    let errors = fs::read_to_string(folder.path.join(ERRORS)).unwrap_or_default();
    let why = errors.lines().last().unwrap_or("no message").to_owned();
    // A self-test that has found wrong bytes prints its report, too.
    let text = fs::read_to_string(folder.path.join(OUTPUT)).unwrap_or_default();
    let reports: Vec<Report> = serde_json::from_str(&text).unwrap_or_default();
    match ended {
        Err(error) => Err(error),
        Ok(_) if !reports.is_empty() => Ok((reports, log)),
        Ok(status) => Err(format!("{why} ({status})")),
    }
}

/// Waits for the end of a process, and kills it at the bound.
fn wait(mut child: Child, bound: Duration) -> Result<std::process::ExitStatus, String> {
    let deadline = Instant::now() + bound;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(LOOK),
            Ok(None) => {
                // The process may have ended since the last look, so an error is ignored.
                child.kill().ok();
                child.wait().ok();
                return Err(format!("no result within {bound:?}"));
            }
            Err(error) => return Err(format!("cannot wait for the measurement: {error}")),
        }
    }
}

fn word(memory: Memory) -> &'static str {
    match memory {
        Memory::Dram => "cpu",
        Memory::Vram => "cuda",
    }
}

/// Longest time for the start and the end of a measurement. CUDA and NIXL need some seconds each.
const START: Duration = Duration::from_secs(90);
/// Time between two looks at a process.
const LOOK: Duration = Duration::from_millis(20);
const LOG_LEVEL: &str = "UCX_LOG_LEVEL";
const OUTPUT: &str = "output";
const ERRORS: &str = "errors";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::table;

    /// A slow wire and wrong bytes cannot be planted on a healthy host, so the test has the reports of such self-tests.
    #[test]
    fn a_report_is_judged_by_its_bytes_and_its_rate() {
        let check = |name: &str, memory, requests, wrong, rate: f64, expect: &[&str]| {
            let kind = table::all().find(|kind| kind.as_str() == name).unwrap();
            let report = Report {
                memory: "host".to_owned(),
                requests,
                wrong,
                push_gb_s: rate,
                wire_gb_s: 0.0,
            };
            let mut results = Results::default();
            judge(kind, memory, &[report], &UcxLog::default(), &mut results);
            assert_eq!(results.codes(), expect, "{name} {rate}");
        };
        check("tcp", Memory::Dram, 5, 0, 0.2, &[]);
        check("tcp", Memory::Dram, 5, 0, 0.05, &["wire-slow"]);
        check("nixl", Memory::Vram, 5, 0, 0.54, &["wire-slow"]);
        check("nixl", Memory::Vram, 5, 0, 380.0, &[]);
        check("nixl", Memory::Dram, 5, 1, 6.0, &["wire-wrong-bytes"]);
        check("nixl", Memory::Dram, 0, 0, 0.0, &["wire-fails"]);
    }
}
