//! Translates Mooncake's `mooncake.json` into LMCache's keys and the sidecar's own.
//!
//! Each URL names a host and a first port. As in Mooncake, a sidecar owns 50 ports, beginning with the first
//! port, and its rank N uses the ports first + 9 + 2·N and first + 10 + 2·N.

use discovery::Metadata;

use super::layers::{Layers, Source};
use super::problem::Problem;
use super::value::{HostPort, Role, Value};
use super::yaml::{Entry, Node, Raw};

/// The values of a `mooncake.json` for which the sidecar has no key.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mooncake {
    /// The metadata server that knows the proxy's address; absent if none is given.
    pub(crate) metadata: Option<Metadata>,
    /// Variables for UCX, with their values.
    pub(crate) ucx: Vec<(&'static str, String)>,
}

/// One value of the file.
struct Given {
    line: usize,
    text: String,
}

/// Returns true if the file is a `mooncake.json`.
pub(crate) fn is_mooncakes(entries: &[Entry]) -> bool {
    let has = |name: &str| entries.iter().any(|e| e.key == name);
    has("prefill_url") && has("decode_url")
}

/// Replaces Mooncake's keys by LMCache's keys and the sidecar's own keys. `ranks` is the engine's number of
/// ranks.
pub(crate) fn translate(layers: &mut Layers, role: Option<Role>, ranks: u32) -> Mooncake {
    let prefill = address(layers, "prefill_url");
    let decode = address(layers, "decode_url");
    if let (Some(prefill), Some(decode)) = (&prefill, &decode)
        && prefill.1.host == decode.1.host
        && prefill.1.port.abs_diff(decode.1.port) < APART
    {
        let what = format!(
            "the port is less than {APART} away from the port of prefill_url, on the same host"
        );
        wrong(layers, "decode_url", &decode.0, what, "move one of the two");
    }
    let ours = match role {
        Some(Role::Receiver | Role::Both) => decode,
        _ => prefill,
    };
    if let Some((given, url)) = ours {
        // The size is added even if the role is missing, so that the report does not show the missing size
        // as a second mistake.
        let bytes = BUFFER_BYTES.to_owned();
        add(layers, false, "pd_buffer_size", given.line, bytes);
        if let Some(role) = role {
            place(layers, &given, &url, role, ranks);
        }
    }
    let mut mooncake = Mooncake {
        metadata: metadata(layers),
        ucx: ucx(layers),
    };
    mooncake.ucx.retain(|(_, value)| !value.is_empty());
    mooncake
}

/// Adds the keys for this sidecar's addresses, which follow from the URL for its role.
fn place(layers: &mut Layers, given: &Given, url: &HostPort, role: Role, ranks: u32) {
    let last = u32::from(url.port) + u32::from(APART);
    if url.port == 0 || last > u32::from(u16::MAX) || ranks > MOST {
        let key = if role == Role::Sender {
            "prefill_url"
        } else {
            "decode_url"
        };
        let what = format!("{ranks} ranks do not fit into the {APART} ports that begin here");
        let first = u16::MAX - APART;
        let right = format!("write a port from 1 to {first}, for at most {MOST} ranks");
        wrong(layers, key, given, what, &right);
        return;
    }
    let port = |offset: u32| {
        let port = u32::from(url.port) + offset;
        port.to_string()
    };
    let list = |first: u32| {
        let ports: Vec<_> = (0..ranks).map(|rank| port(first + 2 * rank)).collect();
        ports.join(",")
    };
    let http = if role == Role::Sender { 8100 } else { 8200 };
    let host = HostPort {
        host: url.host.clone(),
        port: http,
    };
    let admin = format!("{}:{}", bracketed(&url.host), port(u32::from(APART) - 1));
    add(
        layers,
        true,
        "engine_url",
        given.line,
        format!("http://{host}"),
    );
    add(layers, true, "admin", given.line, admin);
    if role == Role::Sender {
        return;
    }
    add(layers, false, "pd_peer_host", given.line, url.host.clone());
    add(layers, false, "pd_peer_init_port", given.line, list(9));
    add(layers, false, "pd_peer_alloc_port", given.line, list(10));
    if ranks < 9 {
        add(layers, true, "tcp_port", given.line, port(0));
    }
}

fn metadata(layers: &mut Layers) -> Option<Metadata> {
    let backend = take(layers, "metadata_backend");
    let server = take(layers, "metadata_server")?;
    let kind = backend.as_ref().map(|b| b.text.as_str());
    match Metadata::parse(&server.text, kind) {
        Ok(metadata) => metadata,
        Err(error) => {
            let right = "write host:2379, redis://host:6379 or http://host:8080/metadata";
            wrong(layers, "metadata_server", &server, error.to_string(), right);
            None
        }
    }
}

/// Returns the variables for the transports and devices that UCX may use.
fn ucx(layers: &mut Layers) -> Vec<(&'static str, String)> {
    let device = take(layers, "device_name");
    let protocol = take(layers, "protocol").unwrap_or(Given {
        line: 0,
        text: "tcp".to_owned(),
    });
    let rdma = protocol.text.eq_ignore_ascii_case("rdma");
    if !rdma && !protocol.text.eq_ignore_ascii_case("tcp") {
        let what = "not a protocol of Mooncake's that the sidecar can use";
        wrong(
            layers,
            "protocol",
            &protocol,
            what.to_owned(),
            "write rdma or tcp",
        );
    }
    // Processes of one host may use shared memory and CUDA IPC, whatever the value of `protocol` is.
    let tls = if rdma {
        "ib,sm,self,cuda"
    } else {
        "tcp,sm,self,cuda"
    };
    let names = device.map_or(String::new(), |d| d.text);
    let devices: Vec<_> = names
        .trim_matches(['[', ']'])
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        // An RDMA device has several ports, and UCX needs the port's number.
        .map(|name| {
            if rdma && !name.contains(':') {
                format!("{name}:1")
            } else {
                name.to_owned()
            }
        })
        .collect();
    vec![
        ("UCX_TLS", tls.to_owned()),
        ("UCX_NET_DEVICES", devices.join(",")),
    ]
}

fn address(layers: &mut Layers, key: &'static str) -> Option<(Given, HostPort)> {
    let given = take(layers, key)?;
    match HostPort::read(&Raw::outside(&given.text), &mut Vec::new()) {
        Ok(address) => Some((given, address)),
        Err(what) => {
            wrong(layers, key, &given, what, "write host:port");
            None
        }
    }
}

fn take(layers: &mut Layers, key: &str) -> Option<Given> {
    let at = layers.lmcache.iter().position(|e| e.key == key)?;
    let entry = layers.lmcache.remove(at);
    let text = entry.value.raw.show();
    Some(Given {
        line: entry.line,
        text,
    })
}

fn add(layers: &mut Layers, ours: bool, key: &str, line: usize, text: String) {
    let section = if ours {
        &mut layers.sidecar
    } else {
        &mut layers.lmcache
    };
    // The file already has this key. The user wrote the key for the sidecar, so its value stays.
    if section.iter().any(|e| e.key == key) {
        return;
    }
    let raw = Raw::Scalar { text, plain: false };
    section.push(Entry {
        key: key.to_owned(),
        line,
        value: Node { line, raw },
    });
}

fn wrong(layers: &mut Layers, key: &str, given: &Given, what: String, right: &str) {
    let source = Source::File(layers.path.clone(), given.line);
    layers.problems.push(Problem {
        place: source.to_string(),
        key: key.to_owned(),
        value: given.text.clone(),
        what,
        right: right.to_owned(),
    });
}

fn bracketed(host: &str) -> String {
    if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    }
}

/// Number of ports of one sidecar. On one host, the first ports of two sidecars must be at least this far
/// apart.
const APART: u16 = 50;
/// Largest number of ranks whose ports fit into the ports of one sidecar.
const MOST: u32 = 20;
/// Bytes of the buffer if the file does not set `pd_buffer_size`: the default of vLLM's `kv_buffer_size`.
const BUFFER_BYTES: &str = "1000000000";
