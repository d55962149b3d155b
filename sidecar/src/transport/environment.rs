//! Starts this program again with the environment that UCX and the dynamic linker need. Both read their variables before
//! this program could change them.

use std::net::IpAddr;
use std::os::unix::process::CommandExt;
use std::path::Path;

use nix::ifaddrs::getifaddrs;

use super::nixl;
use super::rdma::replacement::LIBRARY_PATH;
use super::rdma::{self, Settings, View, devices::Device};
use super::ucx::{DEVICES, LOG_FILE, OWN_DEVICES, TLS, Ucx, address};
use crate::exit::Exit;
use crate::net::private_folder;

/// Restarts this process with UCX's variables that the environment does not set, and with the system's libibverbs if
/// only that library knows an RDMA device. The process may have threads that read the environment, so the variables must
/// not change in the running process; and the dynamic linker reads `LD_LIBRARY_PATH` only at the start. Returns `None` if
/// no variable is missing, and an exit code if the restart fails. Does not return if the restart succeeds.
pub(crate) fn prepare(ucx: &Ucx) -> Option<Exit> {
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
                            .chain(rdma_ports())
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
    if ucx.is_loaded {
        wanted.push((LOG_FILE, "stderr".to_owned()));
    }
    let mut missing: Vec<_> = wanted
        .into_iter()
        .filter(|(name, _)| std::env::var_os(name).is_none_or(|value| value.is_empty()))
        .collect();
    if ucx.is_loaded {
        let mut settings = Settings::of_process();
        for (name, value) in &missing {
            match *name {
                TLS => settings.tls.clone_from(value),
                DEVICES => settings.net_devices.clone_from(value),
                _ => {}
            }
        }
        missing.extend(systems_libibverbs(settings));
    }
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

/// Returns the variables with which NIXL loads the system's libibverbs in the place of its own; empty if NIXL does not
/// need it, or if it cannot be had.
fn systems_libibverbs(settings: Settings) -> Vec<(&'static str, String)> {
    let before = settings.library_path.clone();
    let Some(replacement) = rdma_view(Path::new("/"), settings).replacement() else {
        return Vec::new();
    };
    let runtime = std::env::var("XDG_RUNTIME_DIR").ok();
    let uid = rustix::process::geteuid().as_raw();
    let folder = private_folder::of_user(runtime.as_deref(), uid) + "/libraries";
    let library = replacement.library.display();
    // The dynamic linker removes LD_LIBRARY_PATH from a program with capabilities of its own. Without this check such a
    // program would restart without end.
    if std::env::var(LINKS).is_ok_and(|earlier| earlier == folder) {
        eprintln!(
            "warning: NIXL needs {library}, but {LIBRARY_PATH} has no effect: the dynamic linker ignores it for a program \
             that has capabilities or the set-user-ID bit"
        );
        return Vec::new();
    }
    if let Err(error) = replacement.make(Path::new(&folder)) {
        eprintln!("warning: NIXL needs {library}, but the link to it cannot be made: {error}");
        return Vec::new();
    }
    let path = if before.is_empty() {
        folder.clone()
    } else {
        format!("{folder}:{before}")
    };
    vec![(LIBRARY_PATH, path), (LINKS, folder)]
}

/// The variable with the folder of links with which this process restarted itself.
const LINKS: &str = "PD_LIBRARY_LINKS";

/// Returns the RDMA devices below `root` as the NIXL of this process sees them. `root` is `/` or a test's own folder.
pub(crate) fn rdma_view(root: &Path, settings: Settings) -> View {
    let nixl = nixl::first_library().unwrap_or_default();
    View::new(root, &nixl, settings)
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

/// Returns all ports of all RDMA devices. If UCX's list of devices had only interfaces, UCX would not use
/// RDMA.
fn rdma_ports() -> Vec<String> {
    let devices = rdma::devices::all(Path::new("/"));
    devices.iter().flat_map(Device::ucx_names).collect()
}
