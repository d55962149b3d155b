//! The limit on file descriptors. Most shells and containers set this limit to 1024, which is too low: a single
//! port of a sidecar or a proxy may have 1024 connections.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit on open files of this process to the hard limit, which is the highest value that this user
/// may set.
///
/// # Errors
/// Fails if the kernel refuses the change. The limit then stays as it is.
pub fn raise() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return Ok(());
    }
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

/// Returns the number of files that this process may have open at once; `None` if there is no limit.
pub fn permitted() -> Option<u64> {
    getrlimit(Resource::Nofile).current
}
