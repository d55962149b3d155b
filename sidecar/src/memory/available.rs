//! Determines how much memory this process may still allocate: the smallest amount that the host, the control
//! groups and the resource limits leave.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};

/// The memory limit that leaves this process the fewest bytes, and the number of these bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Available {
    /// The bytes that may still be allocated; `u64::MAX` if no limit is known.
    pub(crate) bytes: u64,
    /// The limit that leaves the fewest bytes.
    pub(crate) limit: Limit,
}

/// A limit on the memory that this process may allocate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Limit {
    /// The host's `MemAvailable`.
    Host,
    /// The memory limit of a control group, with the group's folder.
    Cgroup(PathBuf),
    /// `RLIMIT_AS`, the limit of the process's address space.
    AddressSpace,
    /// `RLIMIT_FSIZE`, the limit of a file's size, which also holds for memfds.
    FileSize,
    /// No limit is known.
    Unknown,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("the host's MemAvailable"),
            Self::Cgroup(path) => write!(f, "the memory limit of control group {}", path.display()),
            Self::AddressSpace => f.write_str("RLIMIT_AS (ulimit -v)"),
            Self::FileSize => f.write_str("RLIMIT_FSIZE (ulimit -f)"),
            Self::Unknown => f.write_str("no known limit"),
        }
    }
}

impl Available {
    /// Reads every limit and returns the tightest. A limit that cannot be read does not count.
    pub(crate) fn now() -> Self {
        let mut found = vec![(u64::MAX, Limit::Unknown)];
        let read = |path: &str| fs::read_to_string(path).ok();
        if let Some(bytes) = read("/proc/meminfo").as_deref().and_then(mem_available) {
            found.push((bytes, Limit::Host));
        }
        if let Some(text) = read("/proc/self/cgroup") {
            found.extend(cgroups(&text, Path::new("/sys/fs/cgroup")));
        }
        if let Some(limit) = getrlimit(Resource::As).current {
            let used = read("/proc/self/statm").as_deref().and_then(first_number);
            let used = used.unwrap_or(0) * rustix::param::page_size() as u64;
            found.push((limit.saturating_sub(used), Limit::AddressSpace));
        }
        if let Some(limit) = getrlimit(Resource::Fsize).current {
            found.push((limit, Limit::FileSize));
        }
        let tightest = found.into_iter().min_by_key(|(bytes, _)| *bytes);
        let (bytes, limit) = tightest.unwrap_or((u64::MAX, Limit::Unknown));
        Self { bytes, limit }
    }
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    first_number(line)?.checked_mul(1024)
}

fn first_number(text: &str) -> Option<u64> {
    text.split_ascii_whitespace().next()?.parse().ok()
}

/// Returns the bytes that each memory control group of this process still allows. `membership` is the text of
/// `/proc/self/cgroup`: lines of `hierarchy:controllers:path`. Version 2 has hierarchy 0 and no controllers.
fn cgroups(membership: &str, mount: &Path) -> Vec<(u64, Limit)> {
    let mut found = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (root, files) = match controllers {
            "" => (mount.to_path_buf(), V2),
            _ if controllers.split(',').any(|name| name == "memory") => (mount.join("memory"), V1),
            _ => continue,
        };
        // In a container the path may name a group of the host that is not mounted in the container. The
        // group of this process is then the root of the mount.
        let own = root.join(path.trim_start_matches('/'));
        let own = if own.is_dir() { own } else { root.clone() };
        for group in own.ancestors().take_while(|group| group.starts_with(&root)) {
            if let Some(bytes) = left_in(group, &files) {
                found.push((bytes, Limit::Cgroup(group.to_path_buf())));
            }
        }
    }
    found
}

struct Files {
    limit: &'static str,
    usage: &'static str,
}

const V1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
};
const V2: Files = Files {
    limit: "memory.max",
    usage: "memory.current",
};

/// Returns the group's limit minus its usage; `None` if the group has no limit. The usage does not include
/// the part of the page cache that the kernel frees first.
fn left_in(group: &Path, files: &Files) -> Option<u64> {
    let number = |name: &str| first_number(&fs::read_to_string(group.join(name)).ok()?);
    let limit = number(files.limit)?;
    let cache = fs::read_to_string(group.join("memory.stat"))
        .ok()
        .and_then(|text| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("inactive_file "))?;
            first_number(line)
        })
        .unwrap_or(0);
    let used = number(files.usage)?.saturating_sub(cache);
    Some(limit.saturating_sub(used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_says_what_is_available() {
        let room = Available::now();
        assert!(room.bytes > 0 && room.bytes < u64::MAX, "{room:?}");
        let text = "MemTotal:  100 kB\nMemAvailable:    24163 kB\n";
        assert_eq!(mem_available(text), Some(24163 << 10));
        assert_eq!(mem_available("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn the_tightest_group_above_counts() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        let own = pod.join("own");
        fs::create_dir_all(&own).unwrap();
        let write =
            |group: &Path, name: &str, text: &str| fs::write(group.join(name), text).unwrap();
        write(&pod, "memory.max", "1000\n");
        write(&pod, "memory.current", "700\n");
        write(&pod, "memory.stat", "anon 1\ninactive_file 200\nfile 3\n");
        write(&own, "memory.max", "max\n");
        write(&own, "memory.current", "5\n");
        let found = cgroups("1:name=systemd:/x\n0::/pod/own\n", dir.path());
        assert_eq!(found, [(500, Limit::Cgroup(pod))]);
    }

    #[test]
    fn version_1_and_a_group_that_is_not_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("memory");
        fs::create_dir_all(&root).unwrap();
        fs::write(root.join("memory.limit_in_bytes"), "4096\n").unwrap();
        fs::write(root.join("memory.usage_in_bytes"), "5000\n").unwrap();
        let found = cgroups("4:cpu,memory:/not/here\n", dir.path());
        assert_eq!(found, [(0, Limit::Cgroup(root))]);
    }
}
