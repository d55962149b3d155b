//! The lines of UCX's log that say which transports it took. UCX has no call for this.

use std::fs;
use std::path::Path;

/// The parts of a log that are needed here.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct UcxLog {
    /// UCX's version and place; empty if the log does not say it.
    pub(super) library: String,
    /// The transports of the last connection, such as `intra-node rma(cma/memory)`; empty if the log does not say it.
    pub(super) route: String,
    /// Variables that begin with `UCX_` and that UCX does not know, with UCX's suggestion.
    pub(super) unknown_variables: Vec<String>,
}

impl UcxLog {
    /// Reads all logs of a folder.
    pub(super) fn read(folder: &Path) -> Self {
        let files = fs::read_dir(folder).into_iter().flatten().flatten();
        let logs = files.filter(|file| file.file_name().to_string_lossy().starts_with("ucx."));
        let texts = logs.filter_map(|file| fs::read_to_string(file.path()).ok());
        Self::parse(&texts.collect::<Vec<_>>().join("\n"))
    }

    fn parse(text: &str) -> Self {
        let mut log = Self::default();
        for line in text.lines() {
            if let Some(at) = line
                .find("ersion ")
                .filter(|_| line.contains("(loaded from "))
            {
                log.library = format!("UCX {}", line[at + "ersion ".len()..].trim());
            }
            if let Some(route) = route(line) {
                log.route = route;
            }
            for marker in [
                "unused environment variable: ",
                "unused environment variables: ",
            ] {
                if let Some((_, names)) = line.split_once(marker) {
                    log.unknown_variables.push(names.trim().to_owned());
                }
            }
        }
        log
    }
}

/// Returns the kind of a connection and its transports: the part of the line around `cfg#1`. UCX's connections within one
/// process do not count if there are others.
fn route(line: &str) -> Option<String> {
    let (before, after) = line.split_once(" cfg#")?;
    let kind = before.rsplit(' ').next()?;
    let (_, lanes) = after.split_once(' ')?;
    let lanes: Vec<&str> = lanes.split_ascii_whitespace().collect();
    (kind != "self").then(|| format!("{kind} {}", lanes.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_ucx_are_understood() {
        let log = UcxLog::parse(
            "[1] [vm:1:0] ucp_context.c:2753 UCX  INFO  Version 1.23.0 (loaded from /x/libucp.so.0, revision 65e342a)\n\
             [1] [vm:1:0] parser.c:2578 UCX  WARN  unused environment variable: UCX_TSL (maybe: UCX_TLS?)\n\
             [1] [vm:1:0] ucp_worker.c:1997 UCX  INFO    a-1 intra-node cfg#1 rma(sysv/memory posix/memory)  \
             am(sysv/memory cma/memory)  ka(sysv/memory)\n\
             [1] [vm:1:0] ucp_worker.c:1997 UCX  INFO    a-1 self cfg#0 rma(self/memory)\n",
        );
        let expect = UcxLog {
            library: "UCX 1.23.0 (loaded from /x/libucp.so.0, revision 65e342a)".to_owned(),
            route: "intra-node rma(sysv/memory posix/memory) am(sysv/memory cma/memory) ka(sysv/memory)".to_owned(),
            unknown_variables: vec!["UCX_TSL (maybe: UCX_TLS?)".to_owned()],
        };
        assert_eq!(log, expect);
        assert_eq!(UcxLog::parse("nothing of interest cfg#"), UcxLog::default());
    }
}
