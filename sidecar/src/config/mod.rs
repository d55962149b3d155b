//! The sidecar's configuration: LMCache's keys and the sidecar's own keys, from flags, environment and one
//! YAML file.
//!
//! There are two kinds of types. [`keys::Lmcache`] and [`keys::Sidecar`] have the values as given: every
//! field is optional and has its source. [`Config`] has the values in use: it is complete and checked, and
//! the rest of the process reads only it. The code that makes a [`Config`] from the given values collects all
//! mistakes, so that the user sees them in one report.

mod channels;
mod checks;
mod key;
mod keys;
mod layers;
mod lmcache;
mod machine_config;
mod mooncake;
mod problem;
mod reference;
mod report;
mod suggest;
mod value;
mod yaml;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use common::identity::Identity;
use discovery::Metadata;

pub(crate) use self::channels::Channel;
pub(crate) use self::layers::{FILE_VARIABLE, Inputs};
#[cfg(test)]
pub(crate) use self::reference::flags;
pub(crate) use self::reference::reference;
pub(crate) use self::report::Report;
pub(crate) use self::suggest::suggest;
pub(crate) use self::value::{Bytes, Device, Devices, HostPort, LogFormat, Role};

use crate::memory::cuda::Which;
use crate::transport::protection::Protection;
use crate::transport::table::Choice;
use crate::transport::ucx::Ucx;

use self::keys::{Lmcache, Sidecar};
use self::layers::Layers;
use self::mooncake::Mooncake;

/// The configuration in use, complete and checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// The role of this sidecar in transfers.
    pub(crate) role: Role,
    /// Name in messages, logs and the proxy's registry.
    pub(crate) id: String,
    /// Number of tensor-parallel ranks of the engine.
    pub(crate) ranks: u32,
    /// Bytes of the buffer of each rank.
    pub(crate) buffer_bytes: u64,
    /// The GPU of each rank's buffer; absent if the buffer is in host memory.
    pub(crate) devices: Vec<Option<Which>>,
    /// Tokens of a chunk: engines with another chunk size are refused. Absent: any chunk size is accepted.
    pub(crate) chunk_tokens: Option<u32>,
    /// Tokens that must fit into the buffer at the same time; 0 means no such check.
    pub(crate) max_prefill_tokens: u32,
    /// The ports to which senders connect; absent if this sidecar only sends.
    pub(crate) listen: Option<Listen>,
    /// The fetch port; absent if engines keep no KV for decode sides.
    pub(crate) fetch: Option<FetchListen>,
    /// The unix socket for the engine.
    pub(crate) socket: PathBuf,
    /// False if no later sidecar uses this socket, so that this sidecar removes all its files when it ends.
    pub(crate) has_successors: bool,
    /// The address that the admin server binds.
    pub(crate) admin: HostPort,
    /// The host name or address under which other machines reach the admin server.
    pub(crate) admin_host: String,
    /// The proxy to register with; absent if the sidecar registers with no proxy.
    pub(crate) proxy: Option<Proxy>,
    /// The key of this process and the roster; absent if no peer proves a key.
    pub(crate) identity: Option<Identity>,
    /// Protection of KV over the built-in TCP transport.
    pub(crate) data: Protection,
    /// Settings of UCX, which NIXL uses.
    pub(crate) ucx: Ucx,
    /// The wires that may be used.
    pub(crate) transport: Choice,
    /// True if this sidecar also knows the peers that the proxy names.
    pub(crate) peers_from_proxy: bool,
    /// True if chunks carry checksums.
    pub(crate) checksum: bool,
    /// False if the sidecar must push no KV. Only tests use this.
    pub(crate) push: bool,
    /// Time limits of all waits.
    pub(crate) times: Times,
    /// Largest number of requests in flight per rank.
    pub(crate) max_requests: u32,
    /// Rate in GB/s. If the wire is slower than this rate, the sidecar sends KV layer by layer; over a faster
    /// wire it sends a step's KV as a whole.
    pub(crate) layers_below_gb_s: u32,
    /// Slots that one sender may leave in quarantine; if absent, a quarter of all slots.
    pub(crate) max_quarantined: Option<u32>,
    /// Directives of the log filter.
    pub(crate) log_level: String,
    /// Format of log lines.
    pub(crate) log_format: LogFormat,
    /// File for the events and actions of the protocol machines; absent if they are not recorded.
    pub(crate) trace: Option<PathBuf>,
}

/// The ports for senders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listen {
    /// The host that the ports are bound to.
    pub(crate) host: String,
    /// The host that senders connect to.
    pub(crate) advertise: String,
    /// The ports of each rank.
    pub(crate) ranks: Vec<RankPorts>,
}

/// The fetch ports, one for each rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FetchListen {
    /// The host that the ports are bound to.
    pub(crate) host: String,
    /// The host that decode sides connect to.
    pub(crate) advertise: String,
    /// The port of rank 0; rank N has this port + N. 0 takes any free port.
    pub(crate) port: u16,
}

/// The ports of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RankPorts {
    /// Port of the init handshake.
    pub(crate) init: u16,
    /// Port of the alloc requests.
    pub(crate) alloc: u16,
    /// Port for the queries of LMCache's bidirectional mode; absent if none is configured.
    pub(crate) query: Option<u16>,
    /// Data port of the built-in TCP transport; 0 means any free port.
    pub(crate) tcp: u16,
}

/// The address of the proxy's registration port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ProxyAddress {
    /// The address is configured.
    At(HostPort),
    /// The sidecar asks this metadata server for the address.
    AskedFor(Metadata),
}

impl fmt::Display for ProxyAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(address) => address.fmt(f),
            Self::AskedFor(metadata) => metadata.fmt(f),
        }
    }
}

/// The proxy that this sidecar registers with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proxy {
    /// The proxy's registration port.
    pub(crate) address: ProxyAddress,
    /// Base URL of the engine's OpenAI server, for the proxy.
    pub(crate) engine_url: String,
    /// Time between two registrations.
    pub(crate) period: Duration,
    /// True if LMCache's keys name the proxy. The proxy may then be LMCache's own.
    pub(crate) may_be_lmcaches: bool,
}

/// The time limits of all waits. The keys in `keys.rs` describe these limits: `heartbeat_ms` describes
/// `heartbeat`, and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Times {
    pub(crate) heartbeat: Duration,
    pub(crate) wait: Duration,
    pub(crate) park: Duration,
    pub(crate) repeat: Duration,
    pub(crate) link: Duration,
    pub(crate) stall: Duration,
    pub(crate) max_wait: Duration,
    pub(crate) no_sender: Duration,
    pub(crate) unclaimed: Duration,
    pub(crate) max_lease: Duration,
    pub(crate) max_keep: Duration,
    pub(crate) fence: Duration,
    pub(crate) drain: Duration,
}

impl Config {
    /// Reads and checks the configuration. The report has the source of each value, even if there are
    /// mistakes.
    ///
    /// # Errors
    /// The report, with all wrong and missing values in `problems`.
    pub(crate) fn load(inputs: &Inputs) -> Result<(Self, Report), Box<Report>> {
        let mut layers = Layers::new(inputs);
        let mooncake = mooncake(&mut layers, inputs);
        let lmcache = Lmcache::read(&mut layers);
        let sidecar = Sidecar::read(&mut layers);
        let ignored = lmcache::read(&mut layers);
        let unknown = layers.unknown();
        let config = checks::config(&mut layers, inputs, &lmcache, &sidecar, &mooncake);
        let channels = config.as_ref().map_or_else(Vec::new, Config::channels);
        let report = Report::new(layers, channels, ignored, unknown, &inputs.env);
        match config {
            Some(config) if report.problems.is_empty() => Ok((config, report)),
            _ => Err(Box::new(report)),
        }
    }

    /// Returns every channel with its protection.
    pub(crate) fn channels(&self) -> Vec<Channel> {
        channels::of(self)
    }

    /// Returns true if a prefill engine may use this sidecar.
    pub(crate) fn sends(&self) -> bool {
        self.role != Role::Receiver
    }

    /// Returns true if a decode engine may use this sidecar.
    pub(crate) fn receives(&self) -> bool {
        self.role != Role::Sender
    }

    /// Returns the base URL of the admin server. `port` is the port that was bound.
    pub(crate) fn admin_url(&self, port: u16) -> String {
        let at = HostPort {
            host: self.admin_host.clone(),
            port,
        };
        format!("http://{at}")
    }
}

impl Inputs {
    /// Collects the flags, this process's environment, and the file that a flag or a variable names.
    ///
    /// # Errors
    /// The path of a file that cannot be read, and the reason.
    pub(crate) fn of_process(
        flags: Vec<(&'static str, String)>,
        file: Option<PathBuf>,
    ) -> Result<Self, String> {
        let env: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let named = env
            .iter()
            .find(|(name, value)| name == FILE_VARIABLE && !value.is_empty())
            .map(|(_, value)| PathBuf::from(value));
        // An empty variable counts as not set.
        let mooncakes = env
            .iter()
            .find(|(name, value)| name == MOONCAKE_VARIABLE && !value.is_empty())
            .map(|(_, value)| PathBuf::from(value));
        let (path, by) = match (file, named, mooncakes) {
            (Some(path), _, _) => (Some(path), "--config"),
            (None, None, Some(path)) => (Some(path), MOONCAKE_VARIABLE),
            (None, named, _) => (named, FILE_VARIABLE),
        };
        let file = match path {
            None => None,
            Some(path) => {
                let text = std::fs::read_to_string(&path)
                    .map_err(|e| format!("{by}: cannot read {}: {e}", path.display()))?;
                Some((path, text))
            }
        };
        Ok(Self {
            flags,
            env,
            file,
            hostname: rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            uid: rustix::process::geteuid().as_raw(),
            pid: std::process::id(),
        })
    }
}

/// Translates Mooncake's keys if the file is a `mooncake.json`; for any other file the result is empty.
fn mooncake(layers: &mut Layers, inputs: &Inputs) -> Mooncake {
    if !mooncake::is_mooncakes(&layers.lmcache) {
        return Mooncake::default();
    }
    let given = |flag: &str, variable: &str| {
        let flag = inputs.flags.iter().find(|(name, _)| *name == flag);
        let variable = inputs.env.iter().find(|(name, _)| name == variable);
        flag.map(|(_, v)| v).or(variable.map(|(_, v)| v))
    };
    let role = given("--role", "LMCACHE_PD_ROLE").and_then(|text| read(text).ok());
    let ranks = given("", "PD_SIDECAR_RANKS").and_then(|text| text.trim().parse().ok());
    mooncake::translate(layers, role, ranks.unwrap_or(1))
}

/// The environment variable with the path of Mooncake's file. The flag and LMCache's variable take
/// precedence.
const MOONCAKE_VARIABLE: &str = "MOONCAKE_CONFIG_PATH";

/// Reads one value that is not a key of the configuration, such as a subcommand's own flag.
///
/// # Errors
/// The mistake and the accepted values.
pub(crate) fn read<T: value::Value>(text: &str) -> Result<T, String> {
    T::read(&yaml::Raw::outside(text), &mut Vec::new())
        .map_err(|what| format!("{what}; write {}", T::WANT))
}
