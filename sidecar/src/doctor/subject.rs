//! The things that the doctor examines.

use std::path::PathBuf;

use crate::config::{Config, HostPort, Report};

/// The files of a host. A test uses a folder instead of the root.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
}

impl Host {
    /// Returns the host on which this process runs.
    pub(super) fn this() -> Self {
        Self { root: "/".into() }
    }

    /// Returns a host with the files below `root`.
    #[cfg(test)]
    pub(super) fn below(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Returns the place of a file whose path begins with `/`.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Returns the text of a file, without white space at its ends; `None` if it cannot be read.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.path(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// Returns the sorted names in a folder; none if it cannot be read.
    pub(super) fn list(&self, path: &str) -> Vec<String> {
        let entries = self.path(path).read_dir().into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// Returns true if this process has a capability, by its number in `capabilities(7)`.
    pub(super) fn has_capability(&self, number: u32) -> bool {
        let status = self.read("/proc/self/status").unwrap_or_default();
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
        mask.is_some_and(|mask| mask >> number & 1 == 1)
    }
}

/// The host, the configuration, and the programs and peers that the command line names.
#[derive(Debug)]
pub(super) struct Subject<'a> {
    pub(super) host: &'a Host,
    /// Environment variables.
    pub(super) env: &'a [(String, String)],
    /// The configuration; absent if there is none, or if it has mistakes.
    pub(super) config: Option<&'a Config>,
    /// The report about the configuration; absent if there is no configuration.
    pub(super) report: Option<&'a Report>,
    /// True if a sidecar with this configuration runs already.
    pub(super) is_running: bool,
    /// Base URLs of running programs.
    pub(super) at: &'a [String],
    /// Init ports of receivers.
    pub(super) peers: &'a [HostPort],
}

impl<'a> Subject<'a> {
    /// Returns a host without a configuration.
    #[cfg(test)]
    pub(super) fn of(host: &'a Host, env: &'a [(String, String)]) -> Self {
        Self {
            host,
            env,
            config: None,
            report: None,
            is_running: false,
            at: &[],
            peers: &[],
        }
    }

    /// Returns the value of an environment variable; `None` if it is absent or empty.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        let found = self.env.iter().find(|(n, _)| n == name);
        found
            .map(|(_, value)| value.trim())
            .filter(|value| !value.is_empty())
    }

    /// Returns true if the configuration, or the lack of one, allows a transport that loads UCX.
    pub(super) fn may_use_ucx(&self) -> bool {
        self.config
            .is_none_or(|config| config.transport.may_use_ucx())
    }

    /// Returns true if a buffer of the configuration is in GPU memory.
    pub(super) fn wants_gpu(&self) -> bool {
        self.config
            .is_some_and(|config| config.devices.iter().any(Option::is_some))
    }

    /// Returns the bytes of all buffers in host memory; 0 without a configuration.
    pub(super) fn host_bytes(&self) -> u64 {
        let Some(config) = self.config else { return 0 };
        let roles = u64::from(config.sends()) + u64::from(config.receives());
        let ranks = config.devices.iter().filter(|gpu| gpu.is_none()).count() as u64;
        config.buffer_bytes.saturating_mul(ranks * roles)
    }
}
