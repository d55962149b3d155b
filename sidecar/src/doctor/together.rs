//! Programs that run, compared with each other and with this host.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use common::socket_owner;

use super::finding::{Results, kinds};
use super::pages::{Program, Running};
use crate::config::{HostPort, read};

kinds! {
    RELEASES = Warning "releases-differ":
        "instances of different releases work together, but a mixture should last only for the time of an upgrade";
        "install the same release everywhere";
    CLOCK = Warning "clock-skew":
        "the times in logs, traces and records of the two hosts do not fit together, and certificates may seem expired";
        "let both hosts follow one time server (chrony, systemd-timesyncd)";
    NAMESPACES = Warning "namespaces-differ":
        "UCX compares the namespaces of two processes, and copies through sockets if they differ";
        "start both containers with --ipc=host --pid=host (Kubernetes: hostIPC and hostPID), or set sidecar.transport to \
         a transport that does not need it: tcp, or cuda_ipc between GPUs";
    USERS = Error "users-differ":
        "a sidecar serves only engines of its own user and of root, and an engine uses only a sidecar of its own user or \
         of root";
        "run engine and sidecar as the same user";
}

/// Compares releases, clocks, and the namespaces and users of the processes that run on this host.
pub(super) fn compare(all: &[Running], results: &mut Results) {
    let mut releases: Vec<(&str, String)> = Vec::new();
    for running in all {
        match &running.kind {
            Program::Sidecar(status) => releases.push((&status.version, running.url.clone())),
            Program::Proxy(instances) => {
                let known = instances
                    .iter()
                    .filter(|instance| !instance.release.is_empty());
                releases.extend(known.map(|instance| (&*instance.release, instance.id.clone())));
            }
        }
        if let Some(skew) = running.skew.filter(|skew| *skew > MAX_SKEW) {
            let seen = format!(
                "the clock of {} differs from this host's by {} s",
                running.url,
                skew.as_secs()
            );
            results.add(&CLOCK, seen);
        }
    }
    if releases
        .iter()
        .any(|(release, _)| *release != releases[0].0)
    {
        let shown = releases
            .iter()
            .map(|(release, at)| format!("{at} has {release}"));
        results.add(&RELEASES, shown.collect::<Vec<_>>().join(", "));
    }
    namespaces(all, results);
}

/// Compares the sidecars of this host. A process in a network namespace of its own is not found.
fn namespaces(all: &[Running], results: &mut Results) {
    let sidecars = all
        .iter()
        .filter(|running| matches!(running.kind, Program::Sidecar(_)));
    let mut found: Vec<(&str, u32)> = Vec::new();
    for running in sidecars {
        if let Some(pid) = process(&running.url) {
            found.push((&running.url, pid));
        }
    }
    for pair in found.windows(2) {
        let [(first, one), (second, other)] = pair else {
            continue;
        };
        let differ: Vec<&str> = ["ipc", "pid"]
            .into_iter()
            .filter(|kind| {
                let of = |pid: &u32| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
                matches!((of(one), of(other)), (Some(a), Some(b)) if a != b)
            })
            .collect();
        if !differ.is_empty() {
            let seen = format!(
                "{first} (process {one}) and {second} (process {other}) have different {} namespaces",
                differ.join(" and ")
            );
            results.add(&NAMESPACES, seen);
        }
    }
}

/// Reports an engine that runs as another user than its sidecar. `engine` is the engine's base URL.
pub(super) fn users(engine: &str, results: &mut Results) {
    let Some(pid) = process(engine) else { return };
    let Ok(found) = fs::metadata(format!("/proc/{pid}")) else {
        return;
    };
    let own = rustix::process::geteuid().as_raw();
    if found.uid() != own {
        let seen = format!(
            "the engine at {engine} (process {pid}) runs as user {}, and this sidecar as user {own}",
            found.uid()
        );
        results.add(&USERS, seen);
    }
}

/// Returns the process that listens at a URL of this host; `None` for another host.
fn process(url: &str) -> Option<u32> {
    let rest = url.strip_prefix("http://")?;
    let authority = rest.split('/').next()?;
    let at: HostPort = read(authority).ok()?;
    let is_own = at.is_loopback() || std::net::TcpListener::bind((at.host.as_str(), 0)).is_ok();
    if is_own {
        socket_owner::listener(at.port)
    } else {
        None
    }
}

/// A page's date has seconds, and the answer takes a moment.
const MAX_SKEW: Duration = Duration::from_secs(3);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::pages::{Instance, Standing};

    fn proxy(releases: &[&str], skew: u64) -> Running {
        let instance = |release: &&str| Instance {
            id: "a".to_owned(),
            role: "both".to_owned(),
            standing: Standing {
                state: "ready".to_owned(),
                reason: String::new(),
            },
            unfit: None,
            release: (*release).to_owned(),
        };
        Running {
            url: "http://192.0.2.1:1".to_owned(),
            skew: Some(Duration::from_secs(skew)),
            kind: Program::Proxy(releases.iter().map(instance).collect()),
        }
    }

    #[test]
    fn releases_and_clocks_are_compared() {
        let check = |all: &[Running], expect: &[&str]| {
            let mut results = Results::default();
            compare(all, &mut results);
            assert_eq!(results.codes(), expect);
        };
        check(
            &[proxy(&["0.1.0", "0.1.0", ""], 1), proxy(&["0.1.0"], 3)],
            &[],
        );
        check(
            &[proxy(&["0.1.0"], 1), proxy(&["0.2.0"], 1)],
            &["releases-differ"],
        );
        check(&[proxy(&[], 4)], &["clock-skew"]);
    }
}
