//! Holds the settings of UCX, the library below NIXL, and the names of its environment variables.
//!
//! A process that reaches a TCP port of UCX can read and write this process's memory, so UCX opens such ports only
//! with the user's consent.

use std::net::{IpAddr, ToSocketAddrs};

/// Settings of UCX, the library that NIXL uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ucx {
    /// Variables that UCX gets if the environment does not set them.
    pub(crate) variables: Vec<(&'static str, String)>,
    /// Host that the TCP ports of UCX are bound to; absent if UCX must not open TCP ports.
    pub(crate) tcp_host: Option<String>,
    /// True if the user named the network devices in the environment (`UCX_NET_DEVICES`).
    pub(crate) devices_given: bool,
    /// True if a transport of this process loads UCX.
    pub(crate) is_loaded: bool,
}

impl Ucx {
    /// Returns the settings for two sidecars that communicate only with each other, on this host.
    pub(crate) fn of_this_host(over_tcp: bool, devices_given: bool, is_loaded: bool) -> Self {
        let mut variables = Vec::new();
        if !over_tcp {
            variables.push((SHARED_MEMORY, "y".to_owned()));
            without_tcp(&mut variables);
        }
        Self {
            variables,
            tcp_host: over_tcp.then(|| LOOPBACK.to_owned()),
            devices_given,
            is_loaded,
        }
    }
}

/// Returns the first address of `host`.
pub(crate) fn address(host: &str) -> Option<IpAddr> {
    (host, 0).to_socket_addrs().ok()?.next().map(|at| at.ip())
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
/// The file for UCX's log. UCX's default is the standard output, where its warnings would spoil a report in JSON.
pub(crate) const LOG_FILE: &str = "UCX_LOG_FILE";
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
