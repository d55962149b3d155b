//! Checks the ports to which senders connect, and the ports that other machines can reach.

use common::host::is_loopback;
use common::identity::Auth;

use super::{need, value};
use crate::config::keys::{Lmcache, Sidecar};
use crate::config::layers::{Inputs, Layers, SPAWNED_VARIABLE, Source};
use crate::config::value::{HostPort, Role, is_wildcard};
use crate::config::{FetchListen, Listen, RankPorts};
use crate::transport::Kind;
use crate::transport::protection::Protection;
use crate::transport::table::Choice;
use crate::transport::ucx::Ucx;

pub(super) fn listen(
    layers: &mut Layers,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
    role: Role,
    admin: &HostPort,
) -> Option<Listen> {
    let why = format!(", and required because pd_role is {role}");
    let host = need(
        layers,
        Lmcache::KEYS,
        "pd_peer_host",
        &lmcache.pd_peer_host,
        &why,
    );
    let inits = need(
        layers,
        Lmcache::KEYS,
        "pd_peer_init_port",
        &lmcache.pd_peer_init_port,
        &why,
    );
    let allocs = need(
        layers,
        Lmcache::KEYS,
        "pd_peer_alloc_port",
        &lmcache.pd_peer_alloc_port,
        &why,
    );
    let (host, inits, allocs) = (host?.0, inits?.0, allocs?.0);
    let given = lmcache.pd_peer_alloc_port.as_ref()?;
    // Each rank needs one port of each kind, so lists of different lengths are a mistake.
    if inits.len() != allocs.len() {
        layers.wrong(
            "pd_peer_alloc_port",
            given,
            format!("{} alloc and {} init ports", allocs.len(), inits.len()),
            "list one of each per rank",
        );
        return None;
    }
    let queries = lmcache
        .pd_peer_query_port
        .as_ref()
        .map(|q| q.value.0.clone());
    if let (Some(queries), Some(given)) = (&queries, &lmcache.pd_peer_query_port)
        && queries.len() != inits.len()
    {
        layers.wrong(
            "pd_peer_query_port",
            given,
            format!("{} query and {} init ports", queries.len(), inits.len()),
            "list one of each per rank",
        );
        return None;
    }
    // Rank N uses the port `first` + N. If `first` is 0, each rank uses any free port.
    let first = value(&sidecar.tcp_port)?.0;
    let mut ranks = Vec::new();
    for (rank, (init, alloc)) in (0u16..).zip(inits.iter().zip(&allocs)) {
        let tcp = if first == 0 {
            Some(0)
        } else {
            first.checked_add(rank)
        };
        let Some(tcp) = tcp else {
            let given = sidecar.tcp_port.as_ref()?;
            layers.wrong(
                "sidecar.tcp_port",
                given,
                format!("the port of rank {rank} would be above 65535"),
                "choose a lower port for rank 0",
            );
            return None;
        };
        ranks.push(RankPorts {
            init: *init,
            alloc: *alloc,
            query: queries
                .as_ref()
                .and_then(|q| q.get(usize::from(rank)).copied()),
            tcp,
        });
    }
    let mut ports: Vec<u16> = ranks
        .iter()
        .flat_map(|r| [r.init, r.alloc, r.tcp, r.query.unwrap_or_default()])
        .chain([admin.port])
        .filter(|port| *port != 0)
        .collect();
    // If two keys had the same port, the second bind would fail with a message that does not name the keys.
    ports.sort_unstable();
    if let Some(twice) = ports.windows(2).find(|pair| pair[0] == pair[1]) {
        let what = format!("port {} is used twice", twice[0]);
        layers.wrong(
            "pd_peer_alloc_port",
            given,
            what,
            "give the init, alloc and query ports, sidecar.tcp_port and sidecar.admin different ports",
        );
    }
    let advertise = advertised(layers, lmcache, sidecar, &host, "senders")?;
    Some(Listen {
        host,
        advertise,
        ranks,
    })
}

/// Returns the fetch port; `None` if there is none, or if it has no address that decode sides can reach.
pub(super) fn fetch(
    layers: &mut Layers,
    inputs: &Inputs,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
) -> Option<FetchListen> {
    let host = lmcache
        .pd_peer_host
        .as_ref()
        .map_or_else(|| "127.0.0.1".to_owned(), |host| host.value.0.clone());
    let port = match value(&sidecar.fetch_port) {
        Some(port) => port.0,
        None => {
            // Other machines reach a port only if the user asks for it.
            let opens = is_spawned(inputs) && is_loopback(&host);
            let shown = if opens { "0" } else { "none" };
            layers.computed("sidecar.fetch_port", shown.to_owned(), &Source::Default);
            if !opens {
                return None;
            }
            0
        }
    };
    let advertise = advertised(layers, lmcache, sidecar, &host, "decode sides")?;
    Some(FetchListen {
        host,
        advertise,
        port,
    })
}

/// Checks that each rank has a fetch port, and that no other key names this port. The second bind of a port would fail
/// with a message that does not name the keys.
pub(super) fn fetch_ports(
    layers: &mut Layers,
    sidecar: &Sidecar,
    fetch: &FetchListen,
    listen: Option<&Listen>,
    admin: &HostPort,
    ranks: u32,
) {
    let Some(given) = sidecar.fetch_port.as_ref().filter(|_| fetch.port != 0) else {
        return;
    };
    let mut taken = vec![(admin.port, "sidecar.admin")];
    for rank in listen.iter().flat_map(|listen| &listen.ranks) {
        taken.extend([
            (rank.init, "pd_peer_init_port"),
            (rank.alloc, "pd_peer_alloc_port"),
            (rank.query.unwrap_or_default(), "pd_peer_query_port"),
            (rank.tcp, "sidecar.tcp_port"),
        ]);
    }
    for rank in 0..ranks {
        let port = u16::try_from(rank)
            .ok()
            .and_then(|rank| fetch.port.checked_add(rank));
        let (what, right) = match port {
            None => (
                format!("the port of rank {rank} would be above 65535"),
                "choose a lower port for rank 0",
            ),
            Some(port) => match taken.iter().find(|(other, _)| *other == port) {
                None => continue,
                Some((_, key)) => (
                    format!("rank {rank} would have port {port}, which {key} names"),
                    "rank N has this port + N: choose a port for rank 0 that leaves room",
                ),
            },
        };
        layers.wrong("sidecar.fetch_port", given, what, right);
        return;
    }
}

/// Returns true if an engine has started this sidecar.
fn is_spawned(inputs: &Inputs) -> bool {
    inputs
        .env
        .iter()
        .any(|(name, value)| name == SPAWNED_VARIABLE && !value.is_empty())
}

/// The protection that the configuration gives to the ports.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keys {
    pub(super) auth: Auth,
    pub(super) data: Protection,
}

/// Refuses ports that other machines can reach and at which peers need no key, unless the user consents. Each mistake names
/// the channel and the cure.
pub(super) fn exposed(
    layers: &mut Layers,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
    listen: Option<&Listen>,
    fetch: Option<&FetchListen>,
    ucx: Option<&Ucx>,
    keys: Keys,
) {
    let allowed = value(&sidecar.insecure).unwrap_or(false);
    let closed = keys.auth == Auth::Require;
    let transport = value(&sidecar.transport).unwrap_or(Choice::Auto);
    let mut open = Vec::new();
    if let (Some(listen), Some(given)) = (listen, &lmcache.pd_peer_host)
        && !is_loopback(&listen.host)
    {
        // With keys, the control channels are closed to strangers. The data of each wire has its own protection.
        let (what, cure) = if !closed {
            (Some(UNAUTHENTICATED), ALLOW)
        } else if listen.ranks.iter().any(|rank| rank.query.is_some()) {
            (Some(QUERY), QUERY_CURE)
        } else if transport.kinds().any(Kind::protects_data) && keys.data == Protection::Plain {
            (Some(PLAIN_DATA), PLAIN_DATA_CURE)
        } else {
            (None, "")
        };
        if let Some(what) = what {
            open.push(("pd_peer_host", listen.host.clone()));
            if !allowed {
                layers.wrong("pd_peer_host", given, what, cure);
            }
        }
    }
    if let (Some(fetch), Some(given)) = (fetch, &sidecar.fetch_port)
        && !is_loopback(&fetch.host)
        && !closed
    {
        open.push(("sidecar.fetch_port", fetch.host.clone()));
        if !allowed {
            layers.wrong("sidecar.fetch_port", given, UNAUTHENTICATED, ALLOW);
        }
    }
    if let Some(given) = sidecar.admin.as_ref().filter(|a| !a.value.is_loopback())
        && !closed
    {
        open.push(("sidecar.admin", given.value.to_string()));
        if !allowed {
            layers.wrong("sidecar.admin", given, UNAUTHENTICATED, ALLOW);
        }
    }
    if let (Some(ucx), Some(given)) = (ucx, &sidecar.nixl_over_tcp)
        && let Some(host) = &ucx.tcp_host
        && (ucx.devices_given || !is_loopback(host))
    {
        let at = if ucx.devices_given {
            "on the devices of UCX_NET_DEVICES"
        } else {
            host.as_str()
        };
        open.push(("sidecar.nixl_over_tcp", at.to_owned()));
        if !allowed {
            let (what, cure) = match closed {
                true => (UCX, UCX_CURE),
                false => (UNAUTHENTICATED, ALLOW),
            };
            layers.wrong("sidecar.nixl_over_tcp", given, what, cure);
        }
    }
    if allowed && !open.is_empty() {
        let open: Vec<_> = open.iter().map(|(key, at)| format!("{key} {at}")).collect();
        layers.warnings.push(format!(
            "INSECURE: without authentication beyond this machine: {}; any program that reaches these ports can \
             read and write KV. Keep them inside a trusted network",
            open.join(", ")
        ));
    }
}

const UNAUTHENTICATED: &str = "it listens beyond this machine, and peers need no key";
const ALLOW: &str = "set sidecar.auth to require with sidecar.key_file and sidecar.roster, or use 127.0.0.1, or accept \
                     this in a trusted network: --insecure, PD_SIDECAR_INSECURE=true or sidecar.insecure: true";
const PLAIN_DATA: &str = "the data channel listens beyond this machine, and sidecar.data is plain: whoever is on the path \
                          can read and change KV";
const PLAIN_DATA_CURE: &str =
    "set sidecar.data to sealed or authenticated, or accept this: sidecar.insecure: true";
const QUERY: &str =
    "the query channel listens beyond this machine, and LMCache's peers prove no key";
const QUERY_CURE: &str = "remove pd_peer_query_port, or accept this: sidecar.insecure: true";
const UCX: &str = "the UCX channel listens beyond this machine, and UCX lets anyone who reaches it read and write this \
                   process's memory; sidecar.auth does not protect it";
const UCX_CURE: &str = "remove sidecar.nixl_over_tcp, or accept this: sidecar.insecure: true";

/// Returns the host at which `peers` reach this sidecar's ports. Peers cannot connect to a wildcard address, so the user
/// must then name another host; `None` if the user does not.
fn advertised(
    layers: &mut Layers,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
    host: &str,
    peers: &str,
) -> Option<String> {
    if let Some(advertised) = &sidecar.advertise_host {
        return Some(advertised.value.0.clone());
    }
    if !is_wildcard(host) {
        return Some(host.to_owned());
    }
    layers.wrong(
        "pd_peer_host",
        lmcache.pd_peer_host.as_ref()?,
        format!("{peers} cannot connect to a wildcard address"),
        "write the address of one interface, or set sidecar.advertise_host",
    );
    None
}
