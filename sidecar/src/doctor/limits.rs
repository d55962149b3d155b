//! Limits of the process: locked memory and open files.

use super::finding::{Results, kinds};
use super::rdma;
use super::subject::Subject;
use crate::memory::Size;

kinds! {
    LOCKED_MEMORY = Error "locked-memory":
        "RDMA locks the buffers in memory, so NIXL cannot register a buffer that is larger than this limit";
        "ulimit -l unlimited (systemd: LimitMEMLOCK=infinity; docker: --ulimit memlock=-1; Kubernetes: the capability \
         IPC_LOCK)";
    OPEN_FILES = Warning "open-files":
        "each peer, engine and data connection is an open file, and without free files new connections are refused";
        "raise the hard limit to at least 4096: ulimit -Hn 65536 (systemd: LimitNOFILE=65536; docker: --ulimit nofile)";
}

/// Compares the limits with the needs of the configuration.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let text = subject.host.read("/proc/self/limits").unwrap_or_default();
    if let Some((locked, _)) = limit(&text, "Max locked memory") {
        results.fact("limits", format!("locked memory: {}", shown(locked)));
        let needed = subject.host_bytes().max(LEAST_LOCKED);
        let unlimited = subject.host.has_capability(CAP_IPC_LOCK);
        if locked < needed
            && !unlimited
            && subject.may_use_ucx()
            && !rdma::devices(subject.host).is_empty()
        {
            let seen = format!(
                "this process may lock {}, and the buffers need {}",
                shown(locked),
                Size(needed)
            );
            results.add(&LOCKED_MEMORY, seen);
        }
    }
    if let Some((_, hard)) = limit(&text, "Max open files") {
        results.fact("limits", format!("open files: at most {hard}"));
        if hard < LEAST_FILES {
            let seen = format!("this process may open at most {hard} files");
            results.add(&OPEN_FILES, seen);
        }
    }
}

/// Returns the soft and the hard limit of a line of `/proc/self/limits`; `u64::MAX` for no limit.
fn limit(text: &str, name: &str) -> Option<(u64, u64)> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let mut words = line.split_ascii_whitespace();
    let mut number = || match words.next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    };
    Some((number()?, number()?))
}

fn shown(bytes: u64) -> String {
    match bytes {
        u64::MAX => "no limit".to_owned(),
        bytes => Size(bytes).to_string(),
    }
}

/// The number of the capability to lock memory without a limit.
const CAP_IPC_LOCK: u32 = 14;
/// Smallest limit for RDMA without a configuration: a small buffer and UCX's own memory.
const LEAST_LOCKED: u64 = 1 << 30;
/// One port alone accepts 1024 connections.
const LEAST_FILES: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::super::subject::Host;
    use super::*;

    fn codes(limits: &str, capabilities: &str, rdma: bool) -> Vec<&'static str> {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("proc/self")).unwrap();
        std::fs::write(root.join("proc/self/limits"), limits).unwrap();
        std::fs::write(
            root.join("proc/self/status"),
            format!("CapEff:\t{capabilities}\n"),
        )
        .unwrap();
        if rdma {
            std::fs::create_dir_all(root.join("sys/class/infiniband/mlx5_0/ports/1")).unwrap();
        }
        let host = Host::below(root);
        let mut results = Results::default();
        look(&Subject::of(&host, &[]), &mut results);
        results.codes()
    }

    #[test]
    fn locked_memory_matters_with_rdma_and_without_the_capability() {
        let low = "Max locked memory         8388608              8388608              bytes\n";
        let none = "Max locked memory         unlimited            unlimited            bytes\n";
        assert_eq!(codes(low, "0", true), ["locked-memory"]);
        assert!(codes(low, "0", false).is_empty());
        assert!(codes(low, "0000000000004000", true).is_empty());
        assert!(codes(none, "0", true).is_empty());
    }

    #[test]
    fn the_hard_limit_on_files_counts() {
        let files = |hard| {
            format!("Max open files            1024                 {hard}              files\n")
        };
        assert_eq!(codes(&files(1024), "0", false), ["open-files"]);
        assert!(codes(&files(4096), "0", false).is_empty());
    }
}
