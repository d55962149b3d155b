//! Settings of UCX's TCP ports. A process that reaches such a port can read and write this process's memory,
//! so UCX opens them only with the user's consent.

use super::value;
use crate::config::Ucx;
use crate::config::keys::{Lmcache, Sidecar};
use crate::config::layers::{Inputs, Layers};
use crate::config::mooncake::Mooncake;
use crate::config::problem::{Problem, Row};
use crate::config::value::{NixlOverTcp, Wire, is_wildcard};

pub(super) fn ucx(
    layers: &mut Layers,
    inputs: &Inputs,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
    mooncake: &Mooncake,
) -> Option<Ucx> {
    let given = |name: &str| {
        let found = inputs.env.iter().find(|(n, _)| n == name);
        found
            .map(|(_, value)| value.trim())
            .filter(|v| !v.is_empty())
    };
    let starts_nixl = matches!(value(&sidecar.transport)?, Wire::Auto | Wire::Nixl);
    let mut variables = mooncake.ucx.clone();
    let tcp_host = match value(&sidecar.nixl_over_tcp)? {
        NixlOverTcp::Trusted => {
            let named = [&sidecar.advertise_host, &lmcache.pd_peer_host];
            let mut hosts = named.into_iter().rev().filter_map(value).map(|host| host.0);
            let host = hosts.find(|host| !is_wildcard(host));
            Some(host.unwrap_or_else(|| LOOPBACK.to_owned()))
        }
        NixlOverTcp::Refused => {
            // NIXL's agents must learn of a peer's end, and without this variable UCX does not let such
            // agents connect through shared memory. With TCP the variable is not set: LMCache's sync receiver
            // does not set it either, and a write to such a receiver would then never end.
            variables.push((SHARED_MEMORY, "y".to_owned()));
            match given(TLS).filter(|tls| starts_nixl && names_tcp(tls)) {
                Some(tls) => layers.problems.push(Problem {
                    place: format!("environment {TLS}"),
                    key: "sidecar.nixl_over_tcp".to_owned(),
                    value: NixlOverTcp::Refused.to_string(),
                    what: format!(
                        "{TLS}={tls} lets UCX listen at TCP ports of its own, and whoever reaches one reads and \
                         writes the memory of this process"
                    ),
                    right: format!("{WITHOUT_TCP}, or {CONSENT}"),
                }),
                None => without_tcp(&mut variables),
            }
            None
        }
    };
    for (name, value) in variables.iter().filter(|(name, _)| given(name).is_none()) {
        layers.rows.push(Row {
            key: (*name).to_owned(),
            value: value.clone(),
            source: "what UCX gets".to_owned(),
        });
    }
    Some(Ucx {
        variables,
        tcp_host,
        // The devices that this process chose before it restarted itself were not given by the user.
        devices_given: given(DEVICES).is_some() && given(DEVICES) != given(OWN_DEVICES),
    })
}

impl Ucx {
    /// Returns the settings of two sidecars that only talk with each other on this host.
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

/// Takes tcp out of Mooncake's transports, or excludes it from UCX's transports if there is no list.
fn without_tcp(variables: &mut Vec<(&'static str, String)>) {
    match variables.iter_mut().find(|(name, _)| *name == TLS) {
        Some((_, tls)) => {
            let others: Vec<_> = tls.split(',').filter(|name| *name != "tcp").collect();
            *tls = others.join(",");
        }
        None => variables.push((TLS, "^tcp".to_owned())),
    }
}

/// Returns true if UCX may use TCP under this value of `UCX_TLS`: a list of transports, in which `all`, patterns and
/// other spellings of tcp count, or after `^` a list of excluded ones.
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
const LOOPBACK: &str = "127.0.0.1";
const SHARED_MEMORY: &str = "UCX_MM_ERROR_HANDLING";
const WITHOUT_TCP: &str = "leave tcp out of UCX_TLS (shared memory, CUDA IPC and RDMA remain; UCX_TLS=^tcp is the \
                           default), or set sidecar.transport to tcp";
/// The text that tells the user how to let UCX open TCP ports.
pub(crate) const CONSENT: &str = "if the network keeps strangers out: sidecar.nixl_over_tcp: trusted, or \
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
