//! Holds the settings of UCX, the library below NIXL, and sets its environment variables, which UCX reads when it
//! is loaded.
//!
//! A process that reaches a TCP port of UCX can read and write this process's memory, so UCX opens such ports only
//! with the user's consent.

use std::net::{IpAddr, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::path::Path;

use nix::ifaddrs::getifaddrs;

use crate::exit::Exit;

/// Settings of UCX, the library that NIXL uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ucx {
    /// Variables that UCX gets if the environment does not set them.
    pub(crate) variables: Vec<(&'static str, String)>,
    /// Host that the TCP ports of UCX are bound to; absent if UCX must not open TCP ports.
    pub(crate) tcp_host: Option<String>,
    /// True if the user named the network devices in the environment (`UCX_NET_DEVICES`).
    pub(crate) devices_given: bool,
}

impl Ucx {
    /// Returns the settings for two sidecars that communicate only with each other, on this host.
    pub(crate) fn of_this_host(over_tcp: bool, devices_given: bool) -> Self {
        let mut variables = Vec::new();
        if !over_tcp {
            variables.push((SHARED_MEMORY, "y".to_owned()));
            without_tcp(&mut variables);
        }
        Self {
            variables,
            tcp_host: over_tcp.then(|| LOOPBACK.to_owned()),
            devices_given,
        }
    }
}

/// Restarts this process with UCX's variables that the environment does not set. The process may have threads
/// that read the environment, so the variables must not change in the running process. Returns `None` if no
/// variable is missing, and an exit code if the restart fails. Does not return if the restart succeeds.
pub(crate) fn environment(ucx: &Ucx) -> Option<Exit> {
    let mut wanted = ucx.variables.clone();
    if let Some(host) = ucx.tcp_host.as_ref().filter(|_| !ucx.devices_given) {
        match devices(host) {
            Ok(interface) => {
                // A device that Mooncake's file names for RDMA stays in the list.
                match wanted.iter_mut().find(|(name, _)| *name == DEVICES) {
                    Some((_, devices)) => *devices += &format!(",{interface}"),
                    None => wanted.push((
                        DEVICES,
                        [interface]
                            .into_iter()
                            .chain(rdma())
                            .collect::<Vec<_>>()
                            .join(","),
                    )),
                }
                if !host.contains('.') && address(host).is_some_and(|ip| ip.is_ipv6()) {
                    wanted.push(("UCX_TCP_AF_PRIO", "inet6".to_owned()));
                }
            }
            Err(error) => {
                eprintln!("error: {error}");
                return Some(Exit::Unavailable);
            }
        }
    }
    if let Some((_, devices)) = wanted.iter().find(|(name, _)| *name == DEVICES) {
        wanted.push((OWN_DEVICES, devices.clone()));
    }
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(name, _)| std::env::var_os(name).is_none_or(|value| value.is_empty()))
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    if missing.is_empty() {
        return None;
    }
    let error = std::process::Command::new("/proc/self/exe")
        .arg0(std::env::args_os().next().unwrap_or_default())
        .args(std::env::args_os().skip(1))
        .envs(missing)
        .exec();
    eprintln!("error: cannot restart this program with UCX's variables: {error}");
    Some(Exit::Unavailable)
}

/// Returns the interface that has the address of `host`, because UCX accepts interfaces and not addresses.
fn devices(host: &str) -> Result<String, String> {
    let wanted = address(host)
        .ok_or_else(|| format!("sidecar.nixl_over_tcp: cannot resolve the host {host}"))?;
    let interfaces =
        getifaddrs().map_err(|error| format!("cannot list the network interfaces: {error}"))?;
    for interface in interfaces {
        let ip = interface.address.and_then(|address| {
            let v4 = address.as_sockaddr_in().map(|at| IpAddr::V4(at.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|at| IpAddr::V6(at.ip())))
        });
        if ip == Some(wanted) {
            return Ok(interface.interface_name);
        }
    }
    Err(format!(
        "sidecar.nixl_over_tcp: no network interface has the address {wanted} of {host}: set pd_peer_host (a sender: \
         sidecar.advertise_host) to an address of this machine, or UCX_NET_DEVICES to the interface"
    ))
}

/// Returns the first address of `host`.
pub(crate) fn address(host: &str) -> Option<IpAddr> {
    (host, 0).to_socket_addrs().ok()?.next().map(|at| at.ip())
}

/// Returns all ports of all RDMA devices. If UCX's list of devices had only interfaces, UCX would not use
/// RDMA.
fn rdma() -> Vec<String> {
    let names = |path: &Path| -> Vec<String> {
        let entries = path.read_dir().into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    };
    let devices = Path::new("/sys/class/infiniband");
    let of = |device: String| {
        let ports = names(&devices.join(&device).join("ports"));
        ports
            .into_iter()
            .map(move |port| format!("{device}:{port}"))
    };
    names(devices).into_iter().flat_map(of).collect()
}

/// Removes tcp from the list of transports in Mooncake's settings. If there is no list, excludes tcp from UCX's
/// transports.
pub(crate) fn without_tcp(variables: &mut Vec<(&'static str, String)>) {
    match variables.iter_mut().find(|(name, _)| *name == TLS) {
        Some((_, tls)) => {
            let others: Vec<_> = tls.split(',').filter(|name| *name != "tcp").collect();
            *tls = others.join(",");
        }
        None => variables.push((TLS, "^tcp".to_owned())),
    }
}

/// Returns true if UCX may use TCP under this value of `UCX_TLS`. The value is a list of transports. After `^`,
/// the value is a list of excluded transports; then only the exact name `tcp` excludes TCP. Without `^`, the
/// word `all`, patterns, and names that begin with `tcp` include TCP.
pub(crate) fn names_tcp(tls: &str) -> bool {
    let tls = tls.trim().to_ascii_lowercase();
    let (excluded, names) = match tls.strip_prefix('^') {
        Some(names) => (true, names),
        None => (false, &tls[..]),
    };
    let mut names = names
        .split(',')
        .map(|name| name.trim().trim_start_matches('\\'));
    if excluded {
        return !names.any(|name| name == "tcp");
    }
    names.any(|name| name.starts_with("tcp") || name == "all" || name.contains(['*', '?', '[']))
}

/// Transports that UCX may use.
pub(crate) const TLS: &str = "UCX_TLS";
/// Network devices that UCX may use: interfaces for TCP, ports of RDMA devices.
pub(crate) const DEVICES: &str = "UCX_NET_DEVICES";
/// The variable with the value of `UCX_NET_DEVICES` that this process chose before it restarted itself.
pub(crate) const OWN_DEVICES: &str = "PD_UCX_NET_DEVICES";
/// Host of UCX's ports if the configuration names none.
pub(crate) const LOOPBACK: &str = "127.0.0.1";
/// The variable that allows shared memory for connections that must report the end of a peer.
pub(crate) const SHARED_MEMORY: &str = "UCX_MM_ERROR_HANDLING";
/// The text that tells the user how to let UCX open TCP ports.
pub(crate) const CONSENT: &str = "if strangers cannot reach this network, set sidecar.nixl_over_tcp: trusted, or \
                                  PD_SIDECAR_NIXL_OVER_TCP=trusted";

#[cfg(test)]
mod tests {
    use super::names_tcp;

    #[test]
    fn every_spelling_of_tcp_is_found() {
        for tls in [
            "tcp",
            "all",
            "sm,TCP",
            "self, tcp",
            "^ib",
            "^",
            "*",
            "t?p",
            "\\tcp",
            "tcp:aux",
            "^tcp_x",
        ] {
            assert!(names_tcp(tls), "{tls}");
        }
        for tls in [
            "sm",
            "self,cma",
            "ib,sm,self,cuda",
            "^tcp",
            "^ib,tcp",
            "rc_x,cuda_copy",
        ] {
            assert!(!names_tcp(tls), "{tls}");
        }
    }
}
