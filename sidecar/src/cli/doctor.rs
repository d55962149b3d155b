//! Flags and help of `sidecar doctor`.

use std::path::PathBuf;

use clap::Args;
use protocol::local::Target;

use super::Overrides;
use crate::config::HostPort;

/// Flags of `doctor`.
#[derive(Debug, Args)]
#[command(after_long_help = TEACHING)]
pub(crate) struct Doctor {
    /// The sidecar's configuration file. Default: $LMCACHE_CONFIG_FILE. Without a file, only the host is examined.
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Base URL of a running sidecar's admin server, or of the proxy. Repeat it to compare several programs.
    #[arg(long, value_name = "URL")]
    pub(crate) at: Vec<String>,
    /// Init port of a receiver that this host must reach. The receiver must be a sidecar, not LMCache. Repeatable.
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    pub(crate) peer: Vec<HostPort>,
    /// Pushes bytes through the running sidecar of this host to a receiver, and measures the rate. The doctor takes the
    /// place of the prefill engine, so no engine may be connected.
    #[arg(long, value_name = "HOST:INIT:ALLOC", value_parser = target, conflicts_with = "answer")]
    pub(crate) push: Option<Target>,
    /// Takes the place of the decode engine at the running sidecar of this host, for the doctor's --push on another host.
    #[arg(long)]
    pub(crate) answer: bool,
    /// Seconds for which each wire of this host is measured. 0 measures nothing.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(0..=600))]
    pub(crate) seconds: u64,
    /// Finding to leave out, by its code. Repeatable.
    #[arg(long, value_name = "CODE")]
    pub(crate) ignore: Vec<String>,
    /// Prints one JSON object instead of text.
    #[arg(long)]
    pub(crate) json: bool,
    /// Prints the tables of docs/doctor.md, which explain every finding, and examines nothing.
    #[arg(long, exclusive = true)]
    pub(crate) reference: bool,
    /// Prints no progress on standard error.
    #[arg(long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

fn host_port(text: &str) -> Result<HostPort, String> {
    crate::config::read(text)
}

/// Reads a receiver's host, init port and alloc port.
fn target(text: &str) -> Result<Target, String> {
    let wrong =
        || "write a host, its init port and its alloc port: decode-host:7300:7400".to_owned();
    let (rest, alloc) = text.rsplit_once(':').ok_or_else(wrong)?;
    let at = host_port(rest).map_err(|_| wrong())?;
    Ok(Target {
        host: at.host,
        init_port: at.port,
        alloc_port: alloc.parse().map_err(|_| wrong())?,
    })
}

const TEACHING: &str = "\
The doctor changes nothing and needs no engine. Run it where the sidecar runs: as the same user, in the same
container, with the same environment. docs/doctor.md explains every finding.

Examples:
  Before the first start, on each host:
    sidecar doctor /etc/pd-sidecar/decode.yaml
  On the prefill host, whether the decode host can be reached, and over which wire:
    sidecar doctor /etc/pd-sidecar/prefill.yaml --peer decode-host:7300
  Between two running sidecars without engines, the rate: first on the decode host, then on the prefill host
    sidecar doctor /etc/pd-sidecar/decode.yaml --answer
    sidecar doctor /etc/pd-sidecar/prefill.yaml --push decode-host:7300:7400
  While a pair runs, with its proxy:
    sidecar doctor --at http://127.0.0.1:7910 --at http://127.0.0.1:7900 --at http://127.0.0.1:8000
  For a script, without measurements:
    sidecar doctor /etc/pd-sidecar/decode.yaml --json --seconds 0 --quiet

Exit codes:
   0  no finding
   1  warnings: it works, but worse than it could, or not for long
   2  errors: it will not work
  64  the command line is wrong";
