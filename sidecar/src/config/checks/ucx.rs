//! Settings of UCX's TCP ports. A process that reaches such a port can read and write this process's memory,
//! so UCX opens such ports only with the user's consent.

use super::value;
use crate::config::keys::{Lmcache, Sidecar};
use crate::config::layers::{Inputs, Layers};
use crate::config::mooncake::Mooncake;
use crate::config::problem::{Problem, Row};
use crate::config::value::{NixlOverTcp, is_wildcard};
use crate::transport::ucx::{
    CONSENT, DEVICES, LOOPBACK, OWN_DEVICES, SHARED_MEMORY, TLS, Ucx, names_tcp, without_tcp,
};

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
    let starts_ucx = value(&sidecar.transport)?.may_use_ucx();
    let mut variables = mooncake.ucx.clone();
    let tcp_host = match value(&sidecar.nixl_over_tcp)? {
        NixlOverTcp::Trusted => {
            let named = [&sidecar.advertise_host, &lmcache.pd_peer_host];
            let mut hosts = named.into_iter().rev().filter_map(value).map(|host| host.0);
            let host = hosts.find(|host| !is_wildcard(host));
            Some(host.unwrap_or_else(|| LOOPBACK.to_owned()))
        }
        NixlOverTcp::Refused => {
            // NIXL's agents ask UCX to report the end of a peer. Without this variable, UCX does not connect
            // NIXL's agents through shared memory. If TCP is allowed, the variable stays unset, because
            // LMCache's sync receiver does not set it. If only the writing process had set the variable, a
            // write would never end.
            variables.push((SHARED_MEMORY, "y".to_owned()));
            match given(TLS).filter(|tls| starts_ucx && names_tcp(tls)) {
                Some(tls) => layers.problems.push(Problem {
                    place: format!("environment {TLS}"),
                    key: "sidecar.nixl_over_tcp".to_owned(),
                    value: NixlOverTcp::Refused.to_string(),
                    what: format!(
                        "{TLS}={tls} lets UCX open TCP ports, and any program that reaches such a port can \
                         read and write the memory of this process"
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
            source: "set for UCX".to_owned(),
        });
    }
    Some(Ucx {
        variables,
        tcp_host,
        // This process may have chosen the devices itself before it restarted itself. Devices that the
        // process chose do not count as given by the user.
        devices_given: given(DEVICES).is_some() && given(DEVICES) != given(OWN_DEVICES),
        is_loaded: starts_ucx,
    })
}

const WITHOUT_TCP: &str = "leave tcp out of UCX_TLS (shared memory, CUDA IPC and RDMA remain; UCX_TLS=^tcp is the \
                           default), or set sidecar.transport to tcp";
