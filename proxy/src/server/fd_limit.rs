//! File descriptors: every request under way holds its client's connection and up to two to engines.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::cli::Config;

/// Raises the soft limit, which is 1024 in most shells, to the hard one. Returns what is to be said if even
/// that is less than the flags permit.
pub fn raise_limit(config: &Config) -> Option<String> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Where it stays as it is, the comparison below says so.
    setrlimit(Resource::Nofile, raised).ok();
    let wanted =
        config.max_connections + crate::server::accept::RESERVE + 2 * config.max_in_flight + OTHERS;
    let permitted = getrlimit(Resource::Nofile).current?;
    (permitted < wanted as u64).then(|| {
        format!(
            "{permitted} open files are permitted (ulimit -n); --max-connections and --max-in-flight may need {wanted}"
        )
    })
}

/// The ports, call-backs, and what the runtime has.
const OTHERS: usize = 128;
