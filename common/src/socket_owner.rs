//! Finds the process that listens on a port, for the error message of a failed bind. Finds the process at the other end
//! of a connection.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

/// Describes the process that listens on TCP `port`, such as `process 4711 (python3)`; `None` if no process listens
/// there.
pub fn holder(port: u16) -> Option<String> {
    let inodes = inodes(|line| listener_inode(line, port));
    if inodes.is_empty() {
        return None;
    }
    Some(match owner(&inodes) {
        Some(pid) => {
            let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({})", command.trim())
        }
        None => "a process of another user".to_owned(),
    })
}

/// Returns the id of the process that listens on TCP `port`; `None` if the kernel shows no such process to this user.
pub fn listener(port: u16) -> Option<u32> {
    let inodes = inodes(|line| listener_inode(line, port));
    if inodes.is_empty() {
        return None;
    }
    owner(&inodes)
}

/// Returns the process on this host that has a connection from `peer` to our `port`; `None` if the kernel does not show
/// the process.
pub fn process_behind(peer: SocketAddr, port: u16) -> Option<u32> {
    let inodes = inodes(|line| connection_inode(line, peer, port));
    if inodes.is_empty() {
        return None;
    }
    owner(&inodes)
}

/// Returns the inodes that `of_line` finds in the lines of the kernel's tables of TCP sockets.
fn inodes(of_line: impl Fn(&str) -> Option<&str>) -> Vec<String> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(table).ok())
        .flat_map(|table| {
            table
                .lines()
                .filter_map(&of_line)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Returns the process that has one of these sockets open; `None` if the kernel does not show the process to this user.
fn owner(inodes: &[String]) -> Option<u32> {
    let targets: Vec<String> = inodes.iter().map(|i| format!("socket:[{i}]")).collect();
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        if holds(&process.path(), &targets) {
            return Some(pid);
        }
    }
    None
}

/// Returns the inode of a line of `/proc/net/tcp` if the line is a listener on `port`.
fn listener_inode(line: &str, port: u16) -> Option<&str> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
    let listens = *fields.get(3)? == LISTEN;
    (listens && u16::from_str_radix(local_port, 16) == Ok(port)).then_some(*fields.get(9)?)
}

/// Returns the inode of a line of `/proc/net/tcp` if the line is `peer`'s end of a connection to `port`.
fn connection_inode(line: &str, peer: SocketAddr, port: u16) -> Option<&str> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (address, local_port) = fields.get(1)?.rsplit_once(':')?;
    let (_, remote_port) = fields.get(2)?.rsplit_once(':')?;
    let is = |text: &str, wanted: u16| u16::from_str_radix(text, 16) == Ok(wanted);
    let connected = *fields.get(3)? == ESTABLISHED;
    let same = address.eq_ignore_ascii_case(&as_in_proc(peer.ip()))
        || matches!(peer.ip(), IpAddr::V4(v4)
            if address.eq_ignore_ascii_case(&as_in_proc(v4.to_ipv6_mapped().into())));
    (connected && same && is(local_port, peer.port()) && is(remote_port, port))
        .then_some(*fields.get(9)?)
}

/// Writes an address as in `/proc/net/tcp`: words of 32 bits in the kernel's byte order.
fn as_in_proc(address: IpAddr) -> String {
    let words = |bytes: &[u8]| -> String {
        let (words, _) = bytes.as_chunks::<4>();
        words
            .iter()
            .map(|word| format!("{:08X}", u32::from_ne_bytes(*word)))
            .collect()
    };
    match address {
        IpAddr::V4(v4) => words(&v4.octets()),
        IpAddr::V6(v6) => words(&v6.octets()),
    }
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
/// `TCP_ESTABLISHED` in the state column.
const ESTABLISHED: &str = "01";

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
        assert_eq!(super::listener(port), Some(std::process::id()));
        drop(listener);
        assert_eq!(holder(port), None);
    }

    #[test]
    fn finds_the_process_at_the_other_end() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(host) else {
                continue; // no IPv6 here
            };
            let address = listener.local_addr().unwrap();
            let client = std::net::TcpStream::connect(address).unwrap();
            let peer = client.local_addr().unwrap();
            assert_eq!(
                process_behind(peer, address.port()),
                Some(std::process::id())
            );
            assert_eq!(process_behind(peer, address.port() ^ 1), None);
        }
    }
}
