//! The limit of file descriptors. Each request in flight holds its client's connection, and up to two
//! connections to engines.

use common::fd_limit;

use crate::config::cli::Config;

/// Raises the soft limit of open files, which is 1024 in most shells, to the hard limit. Returns a warning if
/// even the hard limit is too low for the flags.
pub fn raise_limit(config: &Config) -> Option<String> {
    // If this fails, the comparison below finds the old limit and returns the warning.
    fd_limit::raise().ok();
    let wanted =
        config.max_connections + crate::server::accept::RESERVE + 2 * config.max_in_flight + OTHERS;
    let permitted = fd_limit::permitted()?;
    (permitted < wanted as u64).then(|| {
        format!(
            "{permitted} open files are permitted (ulimit -n); --max-connections and --max-in-flight may need {wanted}"
        )
    })
}

/// Number of file descriptors for the ports, the call-backs and the runtime.
const OTHERS: usize = 128;
