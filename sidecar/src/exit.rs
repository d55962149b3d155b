//! The exit codes of the process.

use std::process::ExitCode;

/// The exit code of the process, with numbers from `sysexits.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The task is done: the sidecar drained after SIGTERM, or the check found no mistake.
    Ok = 0,
    /// The doctor has found faults, and none of them stops the sidecar.
    Warnings = 1,
    /// The doctor has found a fault with which the sidecar moves no KV.
    Errors = 2,
    /// The command line or the configuration is wrong.
    Usage = 64,
    /// A port, a socket, memory or a required transport is not available.
    Unavailable = 69,
    /// The sidecar has a bug.
    Internal = 70,
    /// Requests were still in flight at the drain timeout. A restart may succeed.
    Temporary = 75,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
