//! The exit codes of the process, and its end.

use std::io::Write;

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

impl Exit {
    /// Ends this process with this code, without the destructors of the loaded libraries (see [`nixl::end_process`]).
    pub(crate) fn end_process(self) -> ! {
        // The reader of standard output may have gone; then nobody misses the rest.
        drop(std::io::stdout().flush());
        nixl::end_process(self as u8)
    }
}
