//! From what was given to what holds: defaults that follow from other keys, and what must fit
//! together.

use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::keys::{Key, Lmcache, Sidecar};
use super::layers::{Inputs, Layers, Source, Sourced};
use super::value::{Device, HostPort, Millis, Role, Seconds, Value, is_loopback, is_wildcard};
use super::{Config, Listen, Proxy, RankPorts, Times};

/// The configuration, or `None` if something that it cannot do without is missing or wrong. What is
/// wrong is noted in `layers`; only without any note the result may be used.
pub(crate) fn config(
    layers: &mut Layers,
    inputs: &Inputs,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
) -> Option<Config> {
    refuse_what_this_version_cannot(layers, lmcache);
    let role = need(layers, Lmcache::KEYS, "pd_role", &lmcache.pd_role, "");
    let buffer_bytes = buffer(layers, lmcache);
    let role = role?;
    let listen = match role {
        Role::Sender => None,
        Role::Receiver | Role::Both => listen(layers, lmcache, sidecar, role),
    };
    let ranks = ranks(layers, sidecar, listen.as_ref());
    let admin = computed(layers, "admin", sidecar.admin.as_ref(), || HostPort {
        host: "127.0.0.1".to_owned(),
        port: if role == Role::Sender { 7910 } else { 7900 },
    });
    let proxy = proxy(layers, lmcache, sidecar, role, &admin);
    let admin_host = admin_host(layers, sidecar, &admin, proxy.is_some());
    exposed(layers, lmcache, sidecar, listen.as_ref());
    let id = id(layers, inputs, sidecar, role, &admin);
    let socket = socket(layers, inputs, sidecar, role);
    let times = times(layers, lmcache, sidecar);
    if let Some(level) = &sidecar.log_level
        && let Err(error) = EnvFilter::try_new(&level.value)
    {
        layers.wrong(
            "sidecar.log_level",
            level,
            error.to_string(),
            "write error, warn, info, debug, trace, or directives like info,sidecar=debug",
        );
    }
    if let Some(count) = &sidecar.max_quarantined {
        layers.computed("sidecar.max_quarantined", count.value.show(), &count.source);
    }
    Some(Config {
        role,
        id,
        ranks,
        buffer_bytes: buffer_bytes?,
        chunk_tokens: value(&lmcache.chunk_size).map(|c| c.0),
        listen,
        socket,
        admin,
        admin_host,
        proxy,
        transport: value(&sidecar.transport)?,
        checksum: value(&sidecar.checksum)?,
        push: value(&sidecar.push)?,
        times: times?,
        max_requests: value(&sidecar.max_requests)?.0,
        max_quarantined: value(&sidecar.max_quarantined).map(|c| c.0),
        log_level: value(&sidecar.log_level)?,
        log_format: value(&sidecar.log_format)?,
        trace: value(&sidecar.trace).map(PathBuf::from),
    })
}

fn refuse_what_this_version_cannot(layers: &mut Layers, lmcache: &Lmcache) {
    if let Some(given) = lmcache.enable_pd.as_ref().filter(|g| !g.value) {
        layers.wrong(
            "enable_pd",
            given,
            "without PD there is nothing for a sidecar to do",
            "set it to true or remove it",
        );
    }
    if let Some(given) = lmcache
        .transfer_channel
        .as_ref()
        .filter(|g| g.value != "nixl")
    {
        layers.wrong(
            "transfer_channel",
            given,
            "LMCache's PD has only nixl",
            "set it to nixl; for the built-in TCP transport set sidecar.transport to tcp",
        );
    }
    if let Some(given) = &lmcache.nixl_backends
        && (given.value.0.is_empty()
            || given.value.0.iter().any(|b| !b.eq_ignore_ascii_case("ucx")))
    {
        layers.wrong(
            "nixl_backends",
            given,
            "this version drives NIXL's UCX backend only",
            "write [UCX]",
        );
    }
    if let Some(given) = lmcache
        .pd_buffer_device
        .as_ref()
        .filter(|g| g.value == Device::Cuda)
    {
        layers.wrong(
            "pd_buffer_device",
            given,
            "this version moves KV through host memory only",
            "write cpu",
        );
    }
}

fn buffer(layers: &mut Layers, lmcache: &Lmcache) -> Option<u64> {
    let given = lmcache.pd_buffer_size.as_ref();
    let bytes = need(
        layers,
        Lmcache::KEYS,
        "pd_buffer_size",
        &lmcache.pd_buffer_size,
        "",
    )?;
    if let Some(given) = given.filter(|_| bytes.0 < MIN_BUFFER_BYTES) {
        layers.wrong(
            "pd_buffer_size",
            given,
            "no chunk of any model fits",
            "give at least two chunks: a chunk of 256 tokens takes 32 MiB for an 8B model",
        );
    }
    Some(bytes.0)
}

fn listen(layers: &mut Layers, lmcache: &Lmcache, sidecar: &Sidecar, role: Role) -> Option<Listen> {
    let why = format!(", and pd_role is {role}");
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
    if inits.len() != allocs.len() {
        layers.wrong(
            "pd_peer_alloc_port",
            given,
            format!("{} alloc and {} init ports", allocs.len(), inits.len()),
            "give one of each a rank",
        );
        return None;
    }
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
                format!("rank {rank} has no port"),
                "begin lower",
            );
            return None;
        };
        ranks.push(RankPorts {
            init: *init,
            alloc: *alloc,
            tcp,
        });
    }
    let mut ports: Vec<u16> = ranks
        .iter()
        .flat_map(|r| [r.init, r.alloc, r.tcp])
        .chain(sidecar.admin.iter().map(|a| a.value.port))
        .filter(|port| *port != 0)
        .collect();
    ports.sort_unstable();
    if let Some(twice) = ports.windows(2).find(|pair| pair[0] == pair[1]) {
        let what = format!("port {} is used twice", twice[0]);
        layers.wrong(
            "pd_peer_alloc_port",
            given,
            what,
            "init, alloc, sidecar.tcp_port and sidecar.admin each need ports of their own",
        );
    }
    let advertise = match &sidecar.advertise_host {
        Some(host) => host.value.0.clone(),
        None if is_wildcard(&host) => {
            layers.wrong(
                "pd_peer_host",
                lmcache.pd_peer_host.as_ref()?,
                "senders cannot connect to every interface",
                "write the address of one, or set sidecar.advertise_host",
            );
            return None;
        }
        None => host.clone(),
    };
    Some(Listen {
        host,
        advertise,
        ranks,
    })
}

fn ranks(layers: &mut Layers, sidecar: &Sidecar, listen: Option<&Listen>) -> u32 {
    let ports = listen.map_or(1, |l| u32::try_from(l.ranks.len()).unwrap_or(u32::MAX));
    match &sidecar.ranks {
        Some(given) => {
            if listen.is_some() && given.value.0 != ports {
                let what = format!("the port lists name {ports}");
                layers.wrong(
                    "sidecar.ranks",
                    given,
                    what,
                    "remove it, or give one port a rank",
                );
            } else if given.value.0 as usize > super::value::MAX_RANKS {
                let right = format!("at most {}", super::value::MAX_RANKS);
                layers.wrong("sidecar.ranks", given, "too many", right);
            }
            given.value.0
        }
        None => {
            layers.computed("sidecar.ranks", ports.to_string(), &Source::Default);
            ports
        }
    }
}

fn proxy(
    layers: &mut Layers,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
    role: Role,
    admin: &HostPort,
) -> Option<Proxy> {
    let theirs = lmcache_proxy(layers, lmcache, sidecar.proxy.is_some());
    let address = match (&sidecar.proxy, theirs) {
        (Some(ours), theirs) => {
            if let Some(theirs) = theirs.filter(|t| *t != ours.value) {
                layers.warnings.push(format!(
                    "pd_proxy_host and pd_proxy_port say {theirs}; sidecar.proxy ({}, {}) wins",
                    ours.value, ours.source
                ));
            }
            Some(ours.value.clone())
        }
        (None, Some(theirs)) => {
            let source = Source::Key("pd_proxy_host, pd_proxy_port".to_owned());
            layers.computed("sidecar.proxy", theirs.to_string(), &source);
            Some(theirs)
        }
        (None, None) => None,
    };
    let engine_url = computed(layers, "engine_url", sidecar.engine_url.as_ref(), || {
        let port = if role == Role::Sender { 8100 } else { 8200 };
        super::value::Url(format!("http://127.0.0.1:{port}"))
    });
    let skip = value(&lmcache.pd_skip_proxy_notification).unwrap_or(false);
    let Some(address) = address.filter(|_| !skip) else {
        layers.warnings.push(
            "no proxy is configured: this sidecar registers nowhere, and whoever routes requests \
             must know its ports and wait for the prefill leg"
                .to_owned(),
        );
        return None;
    };
    if address.port == 0 || is_wildcard(&address.host) {
        if let Some(given) = &sidecar.proxy {
            layers.wrong(
                "sidecar.proxy",
                given,
                "no address to connect to",
                "name host and port",
            );
        } else if let Some(given) = &lmcache.pd_proxy_port {
            layers.wrong(
                "pd_proxy_port",
                given,
                "no address to connect to",
                "name host and port",
            );
        }
    }
    if !address.is_loopback() && admin.is_loopback() {
        layers.warnings.push(format!(
            "the proxy {address} is on another machine and cannot call back the admin server at \
             {admin}: /ready would stay false; set sidecar.admin to an address that it reaches"
        ));
    }
    Some(Proxy {
        address,
        engine_url: engine_url.0,
        period: value(&sidecar.register_ms)?.0,
    })
}

fn lmcache_proxy(layers: &mut Layers, lmcache: &Lmcache, ours: bool) -> Option<HostPort> {
    match (&lmcache.pd_proxy_host, &lmcache.pd_proxy_port) {
        (Some(host), Some(port)) => Some(HostPort {
            host: host.value.0.clone(),
            port: port.value.0,
        }),
        (Some(_), None) if !ours => {
            layers.missing(
                key(Lmcache::KEYS, "pd_proxy_port"),
                ", and pd_proxy_host is set",
            );
            None
        }
        (None, Some(_)) if !ours => {
            layers.missing(
                key(Lmcache::KEYS, "pd_proxy_host"),
                ", and pd_proxy_port is set",
            );
            None
        }
        _ => None,
    }
}

fn admin_host(layers: &mut Layers, sidecar: &Sidecar, admin: &HostPort, called: bool) -> String {
    if !is_wildcard(&admin.host) {
        return admin.host.clone();
    }
    match (&sidecar.advertise_host, &sidecar.admin) {
        (Some(host), _) => return host.value.0.clone(),
        (None, Some(given)) if called => layers.wrong(
            "sidecar.admin",
            given,
            "the proxy cannot call back every interface",
            "write the address of one, or set sidecar.advertise_host",
        ),
        _ => {}
    }
    admin.host.clone()
}

/// Peers are not authenticated yet, so nothing listens beyond this machine unasked.
fn exposed(layers: &mut Layers, lmcache: &Lmcache, sidecar: &Sidecar, listen: Option<&Listen>) {
    let allowed = value(&sidecar.insecure).unwrap_or(false);
    let mut open = Vec::new();
    if let (Some(listen), Some(given)) = (listen, &lmcache.pd_peer_host)
        && !is_loopback(&listen.host)
    {
        open.push(("pd_peer_host", listen.host.clone()));
        if !allowed {
            layers.wrong("pd_peer_host", given, UNAUTHENTICATED, ALLOW);
        }
    }
    if let Some(given) = sidecar.admin.as_ref().filter(|a| !a.value.is_loopback()) {
        open.push(("sidecar.admin", given.value.to_string()));
        if !allowed {
            layers.wrong("sidecar.admin", given, UNAUTHENTICATED, ALLOW);
        }
    }
    if allowed && !open.is_empty() {
        let open: Vec<_> = open.iter().map(|(key, at)| format!("{key} {at}")).collect();
        layers.warnings.push(format!(
            "INSECURE: {} listens beyond this machine without authentication: whoever reaches the \
             ports can read and write KV. Keep them inside a trusted network",
            open.join(" and ")
        ));
    }
}

const UNAUTHENTICATED: &str = "it listens beyond this machine, and peers are not authenticated yet";
const ALLOW: &str = "use 127.0.0.1, or accept that in a trusted network: --insecure, \
                     PD_SIDECAR_INSECURE=true or sidecar.insecure: true";

fn id(
    layers: &mut Layers,
    inputs: &Inputs,
    sidecar: &Sidecar,
    role: Role,
    admin: &HostPort,
) -> String {
    let given = sidecar.id.as_ref();
    let id = computed(layers, "id", given, || {
        // The admin port is unique on a machine and the same after a restart, unless it is 0.
        let number = if admin.port == 0 {
            inputs.pid
        } else {
            u32::from(admin.port)
        };
        let host: String = inputs
            .hostname
            .chars()
            .filter(|c| is_id(*c))
            .take(64)
            .collect();
        format!("{host}-{role}-{number}")
    });
    if let Some(given) = given.filter(|g| g.value.len() > 128 || !g.value.chars().all(is_id)) {
        let right = "write at most 128 letters, digits, `.`, `_`, `:`, `-`";
        layers.wrong(
            "sidecar.id",
            given,
            "not a name that fits logs and metrics",
            right,
        );
    }
    id
}

fn is_id(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._:-".contains(c)
}

fn socket(layers: &mut Layers, inputs: &Inputs, sidecar: &Sidecar, role: Role) -> PathBuf {
    let given = sidecar.socket.as_ref();
    // The engine's connector computes the same.
    let runtime = inputs
        .env
        .iter()
        .find(|(name, _)| name == "XDG_RUNTIME_DIR");
    let path = computed(layers, "socket", given, || match runtime {
        Some((_, directory)) if !directory.is_empty() => {
            format!("{}/pd-sidecar/{role}.sock", directory.trim_end_matches('/'))
        }
        _ => format!("/tmp/pd-sidecar-{}/{role}.sock", inputs.uid),
    });
    if let Some(given) = given {
        if !path.starts_with('/') {
            layers.wrong(
                "sidecar.socket",
                given,
                "not an absolute path",
                "begin with /",
            );
        } else if path.len() > MAX_SOCKET_BYTES {
            let right = format!("the kernel takes at most {MAX_SOCKET_BYTES} bytes");
            layers.wrong("sidecar.socket", given, "too long", right);
        }
    }
    PathBuf::from(path)
}

fn times(layers: &mut Layers, lmcache: &Lmcache, sidecar: &Sidecar) -> Option<Times> {
    let wait = fallback(
        layers,
        "wait_ms",
        sidecar.wait_ms.as_ref(),
        (
            "pd_allocation_timeout_sec",
            lmcache.pd_allocation_timeout_sec.as_ref(),
        ),
        Duration::from_secs(1),
    );
    let drain = fallback(
        layers,
        "drain_timeout_ms",
        sidecar.drain_timeout_ms.as_ref(),
        (
            "pd_shutdown_timeout_sec",
            lmcache.pd_shutdown_timeout_sec.as_ref(),
        ),
        Duration::from_secs(10),
    );
    for (path, given) in [
        ("sidecar.heartbeat_ms", &sidecar.heartbeat_ms),
        ("sidecar.repeat_ms", &sidecar.repeat_ms),
        ("sidecar.link_ms", &sidecar.link_ms),
        ("sidecar.stall_ms", &sidecar.stall_ms),
        ("sidecar.max_lease_ms", &sidecar.max_lease_ms),
        ("sidecar.register_ms", &sidecar.register_ms),
    ] {
        if let Some(given) = given.as_ref().filter(|g| g.value.0 < MIN_PERIOD) {
            layers.wrong(
                path,
                given,
                "it would keep a core busy",
                "write at least 10",
            );
        }
    }
    let times = Times {
        heartbeat: value(&sidecar.heartbeat_ms)?.0,
        wait,
        park: value(&sidecar.park_ms)?.0,
        repeat: value(&sidecar.repeat_ms)?.0,
        link: value(&sidecar.link_ms)?.0,
        stall: value(&sidecar.stall_ms)?.0,
        max_wait: value(&sidecar.max_wait_ms)?.0,
        no_sender: value(&sidecar.no_sender_ms)?.0,
        unclaimed: value(&sidecar.unclaimed_ms)?.0,
        max_lease: value(&sidecar.max_lease_ms)?.0,
        drain,
    };
    let lease = times.heartbeat * 3;
    if lease > times.max_lease {
        layers.warnings.push(format!(
            "three heartbeats take {} ms, longer than max_lease_ms ({}): a receiver with that bound \
             ends leases of live senders",
            lease.as_millis(),
            times.max_lease.as_millis()
        ));
    }
    if times.stall <= times.wait + times.park {
        layers.warnings.push(format!(
            "stall_ms ({}) is not longer than wait_ms and park_ms together ({}): requests that wait \
             for room end as stalled",
            times.stall.as_millis(),
            (times.wait + times.park).as_millis()
        ));
    }
    Some(times)
}

/// Our time, else LMCache's if it is finite, else the default.
fn fallback(
    layers: &mut Layers,
    name: &str,
    ours: Option<&Sourced<Millis>>,
    theirs: (&str, Option<&Sourced<Seconds>>),
    default: Duration,
) -> Duration {
    let path = format!("sidecar.{name}");
    if let Some(ours) = ours {
        return ours.value.0;
    }
    let (time, source) = match theirs.1.and_then(|t| t.value.0) {
        Some(time) => (time, Source::Key(theirs.0.to_owned())),
        None => (default, Source::Default),
    };
    layers.computed(&path, Millis(time).show(), &source);
    time
}

fn computed<T: Value>(
    layers: &mut Layers,
    name: &str,
    given: Option<&Sourced<T>>,
    default: impl FnOnce() -> T,
) -> T {
    if let Some(given) = given {
        return given.value.clone();
    }
    let value = default();
    layers.computed(&format!("sidecar.{name}"), value.show(), &Source::Default);
    value
}

fn need<T: Value>(
    layers: &mut Layers,
    keys: &'static [Key],
    name: &str,
    given: &Option<Sourced<T>>,
    why: &str,
) -> Option<T> {
    if given.is_none() {
        layers.missing(key(keys, name), why);
    }
    value(given)
}

fn value<T: Clone>(given: &Option<Sourced<T>>) -> Option<T> {
    given.as_ref().map(|g| g.value.clone())
}

fn key(keys: &'static [Key], name: &str) -> &'static Key {
    // Names are literals of this file, and a test names each.
    keys.iter()
        .find(|k| k.name == name)
        .expect("a key of the table")
}

/// One page: no chunk of any model is smaller.
const MIN_BUFFER_BYTES: u64 = 4096;
/// `sun_path` has 108 bytes with its terminator.
const MAX_SOCKET_BYTES: usize = 107;
const MIN_PERIOD: Duration = Duration::from_millis(10);
