//! The sidecar's configuration: LMCache's keys and ours, from flags, environment and one YAML file.
//!
//! Two kinds of types: what was given ([`keys::Lmcache`], [`keys::Sidecar`]: every field optional,
//! each with its source) and what holds ([`Config`]: complete, checked, the only one that the rest
//! of the process sees). Between them, everything that is wrong is collected, and said at once.

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

use discovery::Metadata;

pub(crate) use self::checks::{CONSENT, DEVICES, OWN_DEVICES, TLS, names_tcp};
pub(crate) use self::layers::{FILE_VARIABLE, Inputs};
#[cfg(test)]
pub(crate) use self::reference::flags;
pub(crate) use self::reference::reference;
pub(crate) use self::report::Report;
pub(crate) use self::value::{Bytes, Device, Devices, HostPort, LogFormat, Role, Wire};

use crate::memory::cuda::Which;

use self::keys::{Lmcache, Sidecar};
use self::layers::Layers;
use self::mooncake::Mooncake;

/// What holds: complete and checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Which side of transfers this is.
    pub(crate) role: Role,
    /// Name in messages, logs and the proxy's registry.
    pub(crate) id: String,
    /// Tensor-parallel ranks of the engine.
    pub(crate) ranks: u32,
    /// Bytes of the buffer of each rank.
    pub(crate) buffer_bytes: u64,
    /// Of each rank: the GPU that its buffer is on; absent if it is host memory.
    pub(crate) devices: Vec<Option<Which>>,
    /// Tokens of a chunk, if engines with other chunks are to be refused.
    pub(crate) chunk_tokens: Option<u32>,
    /// Tokens that the buffer has to hold at once; 0: any number will do.
    pub(crate) max_prefill_tokens: u32,
    /// Where senders come to; absent for a sender.
    pub(crate) listen: Option<Listen>,
    /// The unix socket for the engine.
    pub(crate) socket: PathBuf,
    /// Where the admin server is bound.
    pub(crate) admin: HostPort,
    /// Host that others reach the admin server at.
    pub(crate) admin_host: String,
    /// Whom to register with.
    pub(crate) proxy: Option<Proxy>,
    /// Settings of UCX, below NIXL.
    pub(crate) ucx: Ucx,
    /// Which wires may be used.
    pub(crate) transport: Wire,
    /// Chunks carry checksums.
    pub(crate) checksum: bool,
    /// KV is pushed at all.
    pub(crate) push: bool,
    /// Bounds of every wait.
    pub(crate) times: Times,
    /// Requests under way at once and rank.
    pub(crate) max_requests: u32,
    /// A faster wire gets a step's KV as a whole.
    pub(crate) layers_below_gb_s: u32,
    /// Slots that one sender may leave quarantined; absent: a quarter of them.
    pub(crate) max_quarantined: Option<u32>,
    /// Directives of the log filter.
    pub(crate) log_level: String,
    /// How log lines look.
    pub(crate) log_format: LogFormat,
    /// Takes the machines' events and actions.
    pub(crate) trace: Option<PathBuf>,
}

/// The ports that senders come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listen {
    /// What they are bound to.
    pub(crate) host: String,
    /// What senders connect to.
    pub(crate) advertise: String,
    /// The ports of each rank.
    pub(crate) ranks: Vec<RankPorts>,
}

/// The ports of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RankPorts {
    /// Init handshake.
    pub(crate) init: u16,
    /// Alloc requests.
    pub(crate) alloc: u16,
    /// Questions of LMCache's bidirectional mode.
    pub(crate) query: Option<u16>,
    /// Data of the built-in TCP transport; 0 is any free one.
    pub(crate) tcp: u16,
}

/// Settings of UCX, below NIXL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ucx {
    /// Variables to set where the environment does not.
    pub(crate) variables: Vec<(&'static str, String)>,
    /// Host that the TCP ports of UCX are bound to; absent: UCX may open none.
    pub(crate) tcp_host: Option<String>,
    /// The environment names the network devices itself (`UCX_NET_DEVICES`).
    pub(crate) devices_given: bool,
}

/// Where the proxy takes registrations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ProxyAddress {
    /// There.
    At(HostPort),
    /// Where a metadata server says.
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
    /// Its registration port.
    pub(crate) address: ProxyAddress,
    /// Base URL of the engine's OpenAI server, for the proxy.
    pub(crate) engine_url: String,
    /// Time between two registrations.
    pub(crate) period: Duration,
    /// LMCache's keys name it, so it may be LMCache's own proxy.
    pub(crate) may_be_lmcaches: bool,
}

/// Bounds of every wait. Each is described at its key.
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
    pub(crate) fence: Duration,
    pub(crate) drain: Duration,
}

impl Config {
    /// Reads everything; the report says what came from where, also if there is no configuration.
    ///
    /// # Errors
    /// Everything that is wrong or missing, in the report's `problems`.
    pub(crate) fn load(inputs: &Inputs) -> Result<(Self, Report), Box<Report>> {
        let mut layers = Layers::new(inputs);
        let mooncake = mooncake(&mut layers, inputs);
        let lmcache = Lmcache::read(&mut layers);
        let sidecar = Sidecar::read(&mut layers);
        let ignored = lmcache::read(&mut layers);
        let unknown = layers.unknown();
        let config = checks::config(&mut layers, inputs, &lmcache, &sidecar, &mooncake);
        let report = Report::new(layers, ignored, unknown, &inputs.env);
        match config {
            Some(config) if report.problems.is_empty() => Ok((config, report)),
            _ => Err(Box::new(report)),
        }
    }

    /// Whether a prefill engine may use this sidecar.
    pub(crate) fn sends(&self) -> bool {
        self.role != Role::Receiver
    }

    /// Whether a decode engine may use this sidecar.
    pub(crate) fn receives(&self) -> bool {
        self.role != Role::Sender
    }

    /// Base URL of the admin server, once its port is known.
    pub(crate) fn admin_url(&self, port: u16) -> String {
        let at = HostPort {
            host: self.admin_host.clone(),
            port,
        };
        format!("http://{at}")
    }
}

impl Inputs {
    /// Flags, this process's environment, and the file that the flag or `LMCACHE_CONFIG_FILE` names.
    ///
    /// # Errors
    /// The file that cannot be read, and why.
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

/// Mooncake's file, if that is what the file is.
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

/// Names Mooncake's file when neither a flag nor LMCache's variable names one.
const MOONCAKE_VARIABLE: &str = "MOONCAKE_CONFIG_PATH";

/// Reads one value outside of any layer: of a subcommand's own flag.
///
/// # Errors
/// What is wrong with it and what would be right.
pub(crate) fn read<T: value::Value>(text: &str) -> Result<T, String> {
    T::read(&yaml::Raw::outside(text), &mut Vec::new())
        .map_err(|what| format!("{what}; write {}", T::WANT))
}
