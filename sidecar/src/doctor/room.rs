//! Memory: room for the buffers, /dev/shm, huge pages.

use super::finding::{Results, kinds};
use super::subject::Subject;
use crate::memory::{Available, Size};

kinds! {
    MEMORY = Error "memory":
        "the sidecar reserves its buffers at its start, and does not start without room for them";
        "lower pd_buffer_size (docs/sizing.md), or raise the limit that is named";
    SHARED_MEMORY = Warning "shared-memory":
        "UCX's connections within a host and vLLM's workers keep files in /dev/shm, and fail when it is full";
        "make it larger (docker: --shm-size=2g or --ipc=host; Kubernetes: an emptyDir with medium Memory at /dev/shm)";
    HUGE_PAGES = Warning "huge-pages":
        "reserved huge pages that no process uses are lost for the buffers, which use only transparent huge pages";
        "lower vm.nr_hugepages, unless another program needs these pages";
}

/// Compares the free memory with the needs of the configuration.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let needed = subject.host_bytes();
    let room = Available::now();
    results.fact(
        "memory",
        format!("{} available ({})", Size(room.bytes), room.limit),
    );
    if !subject.is_running && needed > room.bytes {
        let seen = format!(
            "the buffers need {}, and {} leaves {}",
            Size(needed),
            room.limit,
            Size(room.bytes)
        );
        results.add(&MEMORY, seen);
    }
    shared_memory(subject, results);
    huge_pages(subject, results);
}

fn shared_memory(subject: &Subject<'_>, results: &mut Results) {
    let path = subject.host.path("/dev/shm");
    match rustix::fs::statvfs(&path) {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            results.fact("memory", format!("/dev/shm: {} free", Size(free)));
            // Docker's default is a file system of 64 MiB.
            if free <= LEAST_SHARED {
                results.add(&SHARED_MEMORY, format!("/dev/shm has {} free", Size(free)));
            }
        }
        Err(error) => results.add(&SHARED_MEMORY, format!("/dev/shm cannot be used: {error}")),
    }
}

fn huge_pages(subject: &Subject<'_>, results: &mut Results) {
    let text = subject.host.read("/proc/meminfo").unwrap_or_default();
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok())
    };
    let (free, reserved) = (number("HugePages_Free:"), number("HugePages_Rsvd:"));
    let unused = free.unwrap_or(0).saturating_sub(reserved.unwrap_or(0));
    let bytes = unused.saturating_mul(number("Hugepagesize:").unwrap_or(0) << 10);
    let total = number("MemTotal:").unwrap_or(0) << 10;
    if bytes >= LEAST_HUGE && bytes >= total / 10 {
        let seen = format!(
            "{unused} reserved huge pages ({}) are used by no process",
            Size(bytes)
        );
        results.add(&HUGE_PAGES, seen);
    }
}

const LEAST_SHARED: u64 = 64 << 20;
/// Fewer bytes of unused huge pages are not worth a warning.
const LEAST_HUGE: u64 = 1 << 30;

#[cfg(test)]
mod tests {
    use super::super::subject::Host;
    use super::*;

    #[test]
    fn unused_huge_pages_are_reported_if_they_are_a_tenth_of_the_memory() {
        let check = |total_kib: u64, free: u64, reserved: u64, expect: &[&str]| {
            let folder = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(folder.path().join("proc")).unwrap();
            std::fs::create_dir_all(folder.path().join("dev/shm")).unwrap();
            let text = format!(
                "MemTotal:  {total_kib} kB\nHugePages_Free:  {free}\nHugePages_Rsvd:  {reserved}\n\
                 Hugepagesize:  2048 kB\n"
            );
            std::fs::write(folder.path().join("proc/meminfo"), text).unwrap();
            let host = Host::below(folder.path());
            let mut results = Results::default();
            huge_pages(&Subject::of(&host, &[]), &mut results);
            assert_eq!(results.codes(), expect);
        };
        check(16 << 20, 1024, 0, &["huge-pages"]);
        check(16 << 20, 1024, 900, &[]);
        check(64 << 20, 1024, 0, &[]);
        check(16 << 20, 0, 0, &[]);
    }

    #[test]
    fn a_host_without_shared_memory_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::below(folder.path());
        let mut results = Results::default();
        look(&Subject::of(&host, &[]), &mut results);
        assert_eq!(results.codes(), ["shared-memory"]);
    }
}
