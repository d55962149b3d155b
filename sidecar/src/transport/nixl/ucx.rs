//! Sets UCX's environment variables, which UCX reads when it is loaded.

use std::net::{IpAddr, ToSocketAddrs};
use std::os::unix::process::CommandExt;
use std::path::Path;

use nix::ifaddrs::getifaddrs;

use crate::config::{DEVICES, OWN_DEVICES, Ucx};
use crate::exit::Exit;

/// Restarts this process with UCX's variables that the environment does not set. The process may have threads
/// that read the environment, so the variables must not change in the running process. Returns the exit code
/// of an error; `None` if no variable is missing.
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
    eprintln!("error: cannot begin anew with UCX's variables: {error}");
    Some(Exit::Unavailable)
}

/// Returns the interface that has the address of `host`, because UCX takes interfaces and not addresses.
fn devices(host: &str) -> Result<String, String> {
    let wanted =
        address(host).ok_or_else(|| format!("sidecar.nixl_over_tcp: {host} has no address"))?;
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

/// Returns every port of every RDMA device, which a list of interfaces alone would exclude.
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
