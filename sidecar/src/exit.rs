//! The exit codes of the process.

use std::process::ExitCode;

/// How the process ends, after `sysexits.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// It did what it was asked: drained after SIGTERM, or the check found nothing wrong.
    Ok = 0,
    /// The command line or the configuration is wrong.
    Usage = 64,
    /// A port, a socket, memory or a required transport cannot be had.
    Unavailable = 69,
    /// A bug.
    Internal = 70,
    /// Requests were still under way when the drain timeout passed; a restart may do better.
    Temporary = 75,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
