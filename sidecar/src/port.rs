//! Who listens on a port: for the error of a bind that fails.

use std::fs;
use std::path::Path;

/// Describes the process that listens on TCP `port`, e.g. `process 4711 (python3)`; absent if nobody
/// does or the kernel does not show it to this user.
pub(crate) fn holder(port: u16) -> Option<String> {
    let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| {
            table
                .lines()
                .filter_map(|line| listener_inode(line, port))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    if inodes.is_empty() {
        return None;
    }
    let targets: Vec<String> = inodes.iter().map(|i| format!("socket:[{i}]")).collect();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        if holds(&process.path(), &targets) {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({})", command.trim()));
        }
    }
    Some("a process of another user".to_owned())
}

/// The inode of a line of `/proc/net/tcp` if it is a listener on `port`.
fn listener_inode(line: &str, port: u16) -> Option<&str> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
    let listens = *fields.get(3)? == LISTEN;
    (listens && u16::from_str_radix(local_port, 16) == Ok(port)).then_some(*fields.get(9)?)
}

fn holds(process: &Path, targets: &[String]) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    descriptors
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .any(|link| {
            link.to_str()
                .is_some_and(|l| targets.iter().any(|t| t == l))
        })
}

/// `TCP_LISTEN` in the state column.
const LISTEN: &str = "0A";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_this_process() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let found = holder(port).unwrap();
        assert!(
            found.contains(&format!("process {}", std::process::id())),
            "{found}"
        );
        drop(listener);
        assert_eq!(holder(port), None);
    }
}
