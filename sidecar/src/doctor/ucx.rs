//! The variables with which a user steers UCX, and the kernel's settings that stop its copies within a host.

use super::finding::{Results, kinds};
use super::rdma;
use super::subject::Subject;
use crate::config;
use crate::transport::rdma::devices::Device;
use crate::transport::ucx::{DEVICES, TLS};

kinds! {
    UNKNOWN_TRANSPORT = Warning "ucx-tls-unknown":
        "UCX ignores names that it does not know, so it may use fewer transports than you expect, or none";
        "write names that UCX knows, such as all, self, sm, tcp, rc, ud, dc, cuda, cuda_copy and cuda_ipc";
    UNKNOWN_DEVICE = Error "ucx-device-unknown":
        "UCX uses only the devices of this list, and with none of them it has no network";
        "write ports of RDMA devices (mlx5_0:1) or network interfaces of this host, or unset the variable";
    WITHOUT_CUDA = Warning "ucx-tls-without-cuda":
        "without cuda_copy and cuda_ipc UCX copies GPU memory through sockets, at 0.5 GB/s instead of hundreds";
        "add cuda_copy,cuda_ipc to UCX_TLS, or unset it";
    PTRACE = Warning "ptrace-scope":
        "the kernel lets no process copy from another, so UCX copies twice between two sidecars of a host";
        "sysctl kernel.yama.ptrace_scope=1, or give both sidecars the capability SYS_PTRACE";
}

/// Checks the variables against UCX's names and this host's devices.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    if !subject.may_use_ucx() {
        return;
    }
    if let Some(tls) = subject.variable(TLS) {
        results.fact("ucx", format!("{TLS}={tls}"));
        transports(subject, tls, results);
    }
    if let Some(list) = subject.variable(DEVICES) {
        results.fact("ucx", format!("{DEVICES}={list}"));
        devices(subject, list, results);
    }
    let scope = subject.host.read("/proc/sys/kernel/yama/ptrace_scope");
    let scope = scope.and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
    // With 1, UCX allows the copies by a call of its own.
    if scope >= 3 || scope == 2 && !subject.host.has_capability(CAP_SYS_PTRACE) {
        results.add(&PTRACE, format!("kernel.yama.ptrace_scope is {scope}"));
    }
}

fn transports(subject: &Subject<'_>, tls: &str, results: &mut Results) {
    let (excluded, names) = names(tls);
    for name in &names {
        let plain = name.trim_start_matches('\\');
        let plain = plain.split_once(':').map_or(plain, |(name, _)| name);
        if plain.is_empty() || plain.contains(['*', '?', '[']) || TRANSPORTS.contains(&plain) {
            continue;
        }
        let seen = format!("{TLS}={tls} names {plain:?}");
        match config::suggest(plain, TRANSPORTS.iter().copied()) {
            Some(near) => results.add_with(&UNKNOWN_TRANSPORT, seen, format!("write {near}")),
            None => results.add(&UNKNOWN_TRANSPORT, seen),
        }
    }
    let has = |wanted: &str| {
        let group = |name: &&String| [wanted, "all", "cuda", "*"].contains(&name.as_str());
        names.iter().any(|name| group(&name)) != excluded
    };
    if subject.wants_gpu() && !(has("cuda_copy") && has("cuda_ipc")) {
        results.add(
            &WITHOUT_CUDA,
            format!("{TLS}={tls}, and the buffers are in GPU memory"),
        );
    }
}

fn devices(subject: &Subject<'_>, list: &str, results: &mut Results) {
    let host = subject.host;
    let mut known = host.list("/sys/class/net");
    known.extend(rdma::devices(host).iter().flat_map(Device::ucx_names));
    for name in names(list).1 {
        let is_pattern = name.contains(['*', '?', '[']);
        if name.is_empty() || name == "all" || is_pattern || known.contains(&name) {
            continue;
        }
        let seen = format!(
            "{DEVICES}={list} names {name}; this host has {}",
            known.join(", ")
        );
        results.add(&UNKNOWN_DEVICE, seen);
    }
}

/// Splits a list of UCX: true if the list names what is excluded, and the names.
fn names(list: &str) -> (bool, Vec<String>) {
    let list = list.trim();
    let (excluded, list) = match list.strip_prefix('^') {
        Some(rest) => (true, rest),
        None => (false, list),
    };
    let names = list.split(',').map(|name| name.trim().to_owned());
    (excluded, names.collect())
}

/// The names that UCX 1.x accepts in `UCX_TLS`: transports, and groups of transports.
const TRANSPORTS: &[&str] = &[
    "all",
    "self",
    "sm",
    "shm",
    "mm",
    "posix",
    "sysv",
    "cma",
    "knem",
    "xpmem",
    "tcp",
    "ib",
    "rc",
    "rc_v",
    "rc_x",
    "rc_verbs",
    "rc_mlx5",
    "ud",
    "ud_v",
    "ud_x",
    "ud_verbs",
    "ud_mlx5",
    "dc",
    "dc_x",
    "dc_mlx5",
    "srd",
    "gga",
    "gga_mlx5",
    "rc_gda",
    "cuda",
    "cuda_copy",
    "cuda_ipc",
    "gdr_copy",
    "gda",
    "rocm",
    "rocm_copy",
    "rocm_ipc",
    "rocm_gdr",
    "ze",
    "ze_copy",
    "ze_ipc",
    "ze_gdr",
    "ugni",
    "ugni_rdma",
    "ugni_udt",
];
/// The number of the capability to trace other processes.
const CAP_SYS_PTRACE: u32 = 19;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::subject::Host;
    use super::*;

    fn results(tls: &str, list: &str, scope: &str) -> Results {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("sys/class/net/eth0")).unwrap();
        fs::create_dir_all(root.join("sys/class/infiniband/mlx5_0/ports/1")).unwrap();
        fs::create_dir_all(root.join("proc/sys/kernel/yama")).unwrap();
        fs::write(root.join("proc/sys/kernel/yama/ptrace_scope"), scope).unwrap();
        let env = [
            (TLS.to_owned(), tls.to_owned()),
            (DEVICES.to_owned(), list.to_owned()),
        ];
        let host = Host::below(root);
        let mut results = Results::default();
        look(&Subject::of(&host, &env), &mut results);
        results
    }

    #[test]
    fn names_that_ucx_does_not_know_are_reported() {
        for tls in [
            "",
            "rc,cuda_copy,sm",
            "^tcp",
            "\\rc_verbs",
            "ud:aux",
            "rc*",
            " self , cma ",
        ] {
            assert!(results(tls, "", "0").codes().is_empty(), "{tls}");
        }
        let found = results("rc,cuda_icp", "", "0");
        assert_eq!(found.codes(), ["ucx-tls-unknown"]);
        assert_eq!(found.findings[0].cure, "write cuda_ipc");
        assert_eq!(
            results("^infiniband,tpc", "", "0").codes(),
            ["ucx-tls-unknown"; 2]
        );
    }

    #[test]
    fn devices_that_the_host_lacks_are_reported() {
        for list in ["", "all", "mlx5_0:1,eth0", "mlx5_*"] {
            assert!(results("", list, "1").codes().is_empty(), "{list}");
        }
        for list in ["mlx5_1:1", "mlx5_0", "eth0,eth1"] {
            assert_eq!(
                results("", list, "1").codes(),
                ["ucx-device-unknown"],
                "{list}"
            );
        }
    }

    #[test]
    fn a_kernel_that_forbids_copies_between_processes_is_reported() {
        for (scope, expect) in [("0", 0), ("1", 0), ("2", 1), ("3", 1), ("", 0)] {
            assert_eq!(results("", "", scope).codes().len(), expect, "{scope}");
        }
    }
}
