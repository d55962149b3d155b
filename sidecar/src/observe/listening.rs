//! Lists the sockets on which this process listens. The list comes from the kernel, so it includes the ports
//! that a library opened.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::Serialize;
use tracing::{info, warn};

use crate::config::Config;
use crate::transport::ucx::{self, CONSENT};

/// One socket on which this process listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct Listens {
    /// The purpose: `admin`, `engine`, `init`, `alloc`, `query`, `tcp data`, `nixl over tcp`, or `library`.
    pub(crate) channel: String,
    /// Protocol and address, such as `tcp 127.0.0.1:7300` or `unix /path`. The name of an abstract socket
    /// begins with `@`.
    pub(crate) address: String,
}

/// Logs and returns every socket on which this process listens. `ports` has the channel of each port that the
/// sidecar's own code bound.
///
/// # Errors
/// The process listens on a TCP port that the configuration does not name. Only UCX can have opened such a
/// port, and any process that reaches the port can read and write the memory of this process.
pub(crate) fn checked(
    config: &Config,
    ports: &BTreeMap<u16, String>,
) -> anyhow::Result<Vec<Listens>> {
    let found = match listening() {
        Ok(found) => found,
        Err(error) => {
            warn!(%error, "cannot list the sockets of this process, so the sidecar does not check and show them");
            return Ok(Vec::new());
        }
    };
    let mut all = Vec::new();
    for socket in found {
        let channel = match &socket {
            Socket::Tcp(at) => match ports.get(&at.port()) {
                Some(channel) => channel.clone(),
                None => of_ucx(config, *at)?.to_owned(),
            },
            Socket::Unix(path) if config.socket.as_os_str() == path.as_str() => "engine".to_owned(),
            Socket::Udp(_) | Socket::Unix(_) => "library".to_owned(),
        };
        let address = socket.to_string();
        info!(channel, address, "listens");
        all.push(Listens { channel, address });
    }
    Ok(all)
}

/// Returns the channel of a port that UCX opened, if the configuration allows the port.
fn of_ucx(config: &Config, at: SocketAddr) -> anyhow::Result<&'static str> {
    let Some(host) = &config.ucx.tcp_host else {
        anyhow::bail!(
            "UCX listens at {at}, which the configuration does not allow: any program that reaches this port can read and \
             write the memory of this process; set sidecar.transport to tcp, or {CONSENT}"
        );
    };
    if !config.ucx.devices_given && ucx::address(host) != Some(at.ip()) {
        anyhow::bail!(
            "UCX listens at {at} and not at {host}: set pd_peer_host (a sender: sidecar.advertise_host) to the first \
             address of its interface, or set UCX_NET_DEVICES to the interface"
        );
    }
    Ok("nixl over tcp")
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Socket {
    Tcp(SocketAddr),
    Udp(SocketAddr),
    Unix(String),
}

impl std::fmt::Display for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(at) => write!(f, "tcp {at}"),
            Self::Udp(at) => write!(f, "udp {at}"),
            Self::Unix(path) => write!(f, "unix {path}"),
        }
    }
}

/// Returns every socket of this process that a peer can connect to.
fn listening() -> io::Result<BTreeSet<Socket>> {
    // The tables below have the sockets of all processes in this network namespace. A comparison of inodes
    // finds the sockets of this process.
    let mut inodes = BTreeSet::new();
    for descriptor in fs::read_dir("/proc/self/fd")?.flatten() {
        let Ok(target) = fs::read_link(descriptor.path()) else {
            continue; // closed meanwhile
        };
        let inode = target
            .to_str()
            .and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']'));
        inodes.extend(inode.map(str::to_owned));
    }
    let mut found = BTreeSet::new();
    // A UDP socket has no listening state, but it accepts datagrams from every peer while it is not
    // connected.
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let Ok(text) = fs::read_to_string(format!("/proc/self/net/{table}")) else {
            continue; // no IPv6 here
        };
        let udp = table.starts_with("udp");
        for line in text.lines().skip(1) {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let [_, local, _, state, _, _, _, _, _, inode, ..] = fields[..] else {
                continue;
            };
            if !inodes.contains(inode) || state != if udp { UNCONNECTED } else { LISTEN } {
                continue;
            }
            let at = address(local).ok_or_else(|| io::Error::other(format!("{table}: {line}")))?;
            found.insert(if udp {
                Socket::Udp(at)
            } else {
                Socket::Tcp(at)
            });
        }
    }
    for line in fs::read_to_string("/proc/self/net/unix")?.lines().skip(1) {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, _, _, flags, _, _, inode, ref path @ ..] = fields[..] else {
            continue;
        };
        let accepts = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & ACCEPTS != 0);
        if accepts && inodes.contains(inode) {
            found.insert(Socket::Unix(path.join(" ")));
        }
    }
    Ok(found)
}

/// Reads an address as the kernel prints it: words of 32 bits in the kernel's own byte order, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.split_once(':')?;
    let words: Option<Vec<u32>> = (0..host.len())
        .step_by(8)
        .map(|at| u32::from_str_radix(host.get(at..at + 8)?, 16).ok())
        .collect();
    let bytes: Vec<u8> = words?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let ip = match <[u8; 4]>::try_from(&bytes[..]) {
        Ok(v4) => IpAddr::V4(Ipv4Addr::from(v4)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[..]).ok()?)),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// `TCP_LISTEN` in the state column.
const LISTEN: &str = "0A";
/// A UDP socket without a peer.
const UNCONNECTED: &str = "07";
/// `SO_ACCEPTCON` in the flags of a unix socket.
const ACCEPTS: u32 = 0x10000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_lists_what_this_process_opens() {
        for host in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(tcp) = std::net::TcpListener::bind(host) else {
                continue; // no IPv6 here
            };
            let at = tcp.local_addr().unwrap();
            let client = std::net::TcpStream::connect(at).unwrap();
            let found = listening().unwrap();
            assert!(found.contains(&Socket::Tcp(at)), "{found:?}");
            assert!(!found.contains(&Socket::Tcp(client.local_addr().unwrap())));
            drop(tcp);
            assert!(!listening().unwrap().contains(&Socket::Tcp(at)));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.sock");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let expect = Socket::Unix(path.to_str().unwrap().to_owned());
        assert!(listening().unwrap().contains(&expect));
    }
}
