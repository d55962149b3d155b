//! The processors that this process may use.

use std::path::Path;

use super::finding::{Results, kinds};
use super::subject::{Host, Subject};

kinds! {
    FEW = Warning "cpu-few":
        "the sidecar's messages and its copies need one thread each, and with less than two processors one waits for the \
         other";
        "give the sidecar two processors: a larger CPU limit of the container, or a wider taskset";
    THROTTLED = Warning "cpu-throttled":
        "the kernel stops the sidecar for the rest of each period in which its control group has used its quota, and KV \
         waits";
        "raise the CPU limit of the container, or remove it";
}

/// Reads the affinity and the quotas of the control groups.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let host = subject.host;
    let allowed = allowed(host);
    let groups = groups(host);
    let quota = groups.iter().filter_map(|group| quota(host, group));
    let quota = quota.min_by(f64::total_cmp);
    if let Some(allowed) = allowed {
        let quota = quota.map_or(String::new(), |quota| format!(", quota of {quota:.2}"));
        results.fact("cpu", format!("{allowed} processors{quota}"));
    }
    if let Some(quota) = quota.filter(|quota| *quota < LEAST) {
        let seen = format!("the control group's quota is {quota:.2} processors");
        results.add(&FEW, seen);
    } else if let Some(allowed) = allowed.filter(|allowed| *allowed < 2) {
        results.add(&FEW, format!("this process may use {allowed} processor"));
    }
    for group in &groups {
        if let Some((periods, throttled)) = throttled(host, group)
            && periods >= LEAST_PERIODS
            && throttled * 20 > periods
        {
            let seen = format!("{group}: throttled in {throttled} of {periods} periods");
            results.add(&THROTTLED, seen);
        }
    }
}

/// Returns the number of processors in the process's affinity.
fn allowed(host: &Host) -> Option<usize> {
    let status = host.read("/proc/self/status")?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let count = |part: &str| match part.split_once('-') {
        Some((first, last)) => {
            let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
            Some(last.checked_sub(first)? + 1)
        }
        None => part.parse::<usize>().ok().map(|_| 1),
    };
    list.trim().split(',').map(count).sum()
}

/// Returns the folders of the process's control groups that can limit processors, from the own group to the root.
fn groups(host: &Host) -> Vec<String> {
    let membership = host.read("/proc/self/cgroup").unwrap_or_default();
    let mut folders = Vec::new();
    for line in membership.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let mount = match controllers {
            "" => "/sys/fs/cgroup",
            _ if controllers.split(',').any(|name| name == "cpu") => "/sys/fs/cgroup/cpu",
            _ => continue,
        };
        // In a container the path may name a group of the host, which is not mounted there. The mount's root is then the
        // own group.
        let own = format!("{mount}{path}");
        let own = if host.path(&own).is_dir() {
            own
        } else {
            mount.to_owned()
        };
        let within = |folder: &&Path| folder.starts_with(mount);
        let ancestors = Path::new(&own).ancestors().take_while(within);
        folders.extend(ancestors.map(|path| path.display().to_string()));
    }
    folders
}

/// Returns the processors that a group may use, in both versions of control groups; `None` if there is no quota.
#[expect(clippy::cast_precision_loss, reason = "a number of processors")]
fn quota(host: &Host, group: &str) -> Option<f64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let (quota, period) = match host.read(&format!("{group}/cpu.max")) {
        Some(text) => {
            let (quota, period) = text.split_once(' ')?;
            (number(quota)?, number(period)?)
        }
        None => {
            let read = |file: &str| number(&host.read(&format!("{group}/{file}"))?);
            (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?)
        }
    };
    (period > 0).then(|| quota as f64 / period as f64)
}

/// Returns the number of periods, and the number of those in which the group was stopped.
fn throttled(host: &Host, group: &str) -> Option<(u64, u64)> {
    let text = host.read(&format!("{group}/cpu.stat"))?;
    let number = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse().ok()
    };
    Some((number("nr_periods ")?, number("nr_throttled ")?))
}

/// A quota below this number of processors is reported. Kubernetes gives 1999m as 1.999.
const LEAST: f64 = 1.9;
/// Fewer periods show nothing.
const LEAST_PERIODS: u64 = 100;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn codes(files: &[(&str, &str)]) -> Vec<&'static str> {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::below(folder.path());
        let mut results = Results::default();
        look(&Subject::of(&host, &[]), &mut results);
        results.codes()
    }

    #[test]
    fn one_processor_is_too_few() {
        let status = |list| format!("Name:\tx\nCpus_allowed_list:\t{list}\n");
        for (list, expect) in [("0", 1), ("0-1", 0), ("3,5", 0), ("0-63", 0), ("7", 1)] {
            assert_eq!(
                codes(&[("proc/self/status", &status(list))]).len(),
                expect,
                "{list}"
            );
        }
    }

    #[test]
    fn the_smallest_quota_above_counts_in_both_versions() {
        let v2 = ("proc/self/cgroup", "0::/pod/own\n");
        let check = |max: &'static str| {
            codes(&[
                v2,
                ("sys/fs/cgroup/pod/cpu.max", max),
                ("sys/fs/cgroup/pod/own/cpu.max", "max 100000\n"),
            ])
        };
        assert_eq!(check("50000 100000\n"), ["cpu-few"]);
        assert!(check("200000 100000\n").is_empty());
        assert!(check("max 100000\n").is_empty());
        let v1 = ("proc/self/cgroup", "4:cpu,cpuacct:/not/mounted\n");
        let check = |quota: &'static str| {
            codes(&[
                v1,
                ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota),
                ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
            ])
        };
        assert_eq!(check("100000\n"), ["cpu-few"]);
        assert!(check("-1\n").is_empty());
    }

    #[test]
    fn a_group_that_is_often_stopped_is_reported() {
        let check = |stat: &'static str| {
            codes(&[
                ("proc/self/cgroup", "0::/\n"),
                ("sys/fs/cgroup/cpu.stat", stat),
            ])
        };
        assert_eq!(
            check("usage_usec 5\nnr_periods 1000\nnr_throttled 51\n"),
            ["cpu-throttled"]
        );
        assert!(check("nr_periods 1000\nnr_throttled 50\n").is_empty());
        assert!(check("nr_periods 20\nnr_throttled 20\n").is_empty());
    }
}
