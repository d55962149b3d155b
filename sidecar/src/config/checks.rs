//! Makes the configuration in use from the values that the user gave. Computes the defaults that depend on
//! other keys, and checks that all values fit together.

mod identity;
mod listen;
mod proxy;
mod times;
mod ucx;

use std::path::PathBuf;

use tracing_subscriber::EnvFilter;

use self::identity::{data, identity, is_own_name};
use self::listen::{Keys, exposed, fetch, fetch_ports, listen};
use self::proxy::{admin_host, proxy};
use self::times::times;
use self::ucx::ucx;
use super::key::Key;
use super::keys::{Lmcache, Sidecar};
use super::layers::{Inputs, Layers, SPAWNED_VARIABLE, SPAWNED_WITHOUT_SUCCESSOR, Source, Sourced};
use super::mooncake::Mooncake;
use super::value::{Device, HostPort, MAX_RANKS, Role, Value};
use super::{Config, Listen};
use crate::memory::cuda::Which;
use crate::net::private_folder;

/// Returns the configuration, or `None` if a necessary value is missing or wrong. Mistakes are added to
/// `layers`. The result may be used only if there is no mistake.
pub(crate) fn config(
    layers: &mut Layers,
    inputs: &Inputs,
    lmcache: &Lmcache,
    sidecar: &Sidecar,
    mooncake: &Mooncake,
) -> Option<Config> {
    refuse_what_this_version_cannot(layers, lmcache);
    let role = need(layers, Lmcache::KEYS, "pd_role", &lmcache.pd_role, "");
    // The buffer is checked before `role?`, so that a missing role does not hide a mistake in the buffer's
    // size.
    let buffer_bytes = buffer(layers, lmcache);
    let role = role?;
    let admin = computed(layers, "admin", sidecar.admin.as_ref(), || HostPort {
        host: "127.0.0.1".to_owned(),
        port: if role == Role::Sender { 7910 } else { 7900 },
    });
    let listen = match role {
        Role::Sender => None,
        Role::Receiver | Role::Both => listen(layers, lmcache, sidecar, role, &admin),
    };
    let fetch = match role {
        Role::Receiver => None,
        Role::Sender | Role::Both => fetch(layers, inputs, lmcache, sidecar),
    };
    // The number of ranks follows from the port lists, so the ports come first.
    let ranks = ranks(layers, sidecar, listen.as_ref());
    let devices = devices(layers, lmcache, ranks);
    if let Some(fetch) = &fetch {
        fetch_ports(layers, sidecar, fetch, listen.as_ref(), &admin, ranks);
    }
    let proxy = proxy(
        layers,
        lmcache,
        sidecar,
        mooncake,
        role,
        &admin,
        fetch.is_some(),
    );
    let admin_host = admin_host(layers, sidecar, &admin, proxy.is_some());
    let ucx = ucx(layers, inputs, lmcache, sidecar, mooncake);
    let identity = identity(layers, sidecar, role);
    let data = data(layers, sidecar);
    let keys = Keys {
        auth: value(&sidecar.auth).unwrap_or_default(),
        data,
    };
    exposed(
        layers,
        lmcache,
        sidecar,
        listen.as_ref(),
        fetch.as_ref(),
        ucx.as_ref(),
        keys,
    );
    let id = match &identity {
        Some(identity) => is_own_name(layers, sidecar, identity),
        None => id(layers, inputs, sidecar, role, &admin),
    };
    let socket = socket(layers, inputs, sidecar, role);
    let has_successors = !inputs
        .env
        .iter()
        .any(|(name, value)| name == SPAWNED_VARIABLE && value == SPAWNED_WITHOUT_SUCCESSOR);
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
    Some(Config {
        role,
        id,
        ranks,
        buffer_bytes: buffer_bytes?,
        devices: devices?,
        chunk_tokens: value(&lmcache.chunk_size).map(|c| c.0),
        max_prefill_tokens: value(&lmcache.pd_max_prefill_len).map_or(0, |c| c.0),
        listen,
        fetch,
        socket,
        has_successors,
        admin,
        admin_host,
        proxy,
        identity,
        data,
        ucx: ucx?,
        transport: value(&sidecar.transport)?,
        peers_from_proxy: value(&sidecar.peers_from_proxy)?,
        checksum: value(&sidecar.checksum)?,
        push: value(&sidecar.push)?,
        times: times?,
        max_requests: value(&sidecar.max_requests)?.0,
        layers_below_gb_s: value(&sidecar.layers_below_gb_s)?.0,
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
            "a sidecar does only PD",
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
            "smaller than a chunk of any model",
            "set it to at least two chunks: a chunk of 256 tokens takes 32 MiB for an 8B model",
        );
    }
    Some(bytes.0)
}

fn ranks(layers: &mut Layers, sidecar: &Sidecar, listen: Option<&Listen>) -> u32 {
    let ports = listen.map_or(1, |l| u32::try_from(l.ranks.len()).unwrap_or(u32::MAX));
    match &sidecar.ranks {
        Some(given) => {
            if listen.is_some() && given.value.0 != ports {
                let what = format!("the port lists name {ports} ranks");
                layers.wrong(
                    "sidecar.ranks",
                    given,
                    what,
                    "remove it, or list one port per rank",
                );
            } else if given.value.0 as usize > MAX_RANKS {
                let right = format!("at most {}", MAX_RANKS);
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

/// Returns the GPU of each rank's buffer; absent for host memory.
fn devices(layers: &mut Layers, lmcache: &Lmcache, ranks: u32) -> Option<Vec<Option<Which>>> {
    let given = lmcache.pd_buffer_device.as_ref()?;
    let devices = match &given.value.0[..] {
        [Device::Gpu(_)] if ranks > 1 => {
            let what = format!("one GPU for {ranks} ranks");
            let right = "write cuda, or one device per rank: [cuda:0, cuda:1]";
            layers.wrong("pd_buffer_device", given, what, right);
            return None;
        }
        [one] => vec![one.clone(); ranks as usize],
        all if all.len() == ranks as usize => all.to_vec(),
        all => {
            let what = format!("{} devices for {ranks} ranks", all.len());
            layers.wrong("pd_buffer_device", given, what, "list one device per rank");
            return None;
        }
    };
    let place = |(rank, device)| match device {
        Device::Cpu => None,
        Device::Cuda => Some(Which::Ordinal(rank)),
        Device::Gpu(which) => Some(which),
    };
    Some((0..).zip(devices).map(place).collect())
}

fn id(
    layers: &mut Layers,
    inputs: &Inputs,
    sidecar: &Sidecar,
    role: Role,
    admin: &HostPort,
) -> String {
    let given = sidecar.id.as_ref();
    let id = computed(layers, "id", given, || {
        // The admin port is unique on a machine and the same after a restart. With port 0 (any free port),
        // the name contains the process id instead.
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
            "not a name that logs and metrics can show",
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
    // The engine's connector computes the same path, so the engine finds the socket although no key is set.
    let runtime = inputs
        .env
        .iter()
        .find(|(name, _)| name == "XDG_RUNTIME_DIR")
        .map(|(_, directory)| directory.as_str());
    let path = computed(layers, "socket", given, || {
        format!(
            "{}/{role}.sock",
            private_folder::of_user(runtime, inputs.uid)
        )
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
            let right = format!("write a path of at most {MAX_SOCKET_BYTES} bytes");
            layers.wrong("sidecar.socket", given, "too long", right);
        }
    }
    PathBuf::from(path)
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
    // Every name is a literal in this module's code, and a test covers each of them, so no user sees this
    // panic.
    keys.iter()
        .find(|k| k.name == name)
        .expect("a key of the table")
}

/// Smallest buffer: one page. No model has a smaller chunk.
const MIN_BUFFER_BYTES: u64 = 4096;
/// Longest path of a socket: the kernel's `sun_path` has 108 bytes with its terminator.
const MAX_SOCKET_BYTES: usize = 107;
