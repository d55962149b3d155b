//! Flags and subcommands, and the help that explains them and the exit codes.

mod doctor;
mod drain;

use std::io::Write;
use std::path::PathBuf;
use std::sync::LazyLock;

use clap::{Args, CommandFactory, Parser, Subcommand};
use common::identity::{Newcomer, keygen, keygen_all};
use common::manual::{Completions, Manual};

pub(crate) use self::doctor::Doctor;
pub(crate) use self::drain::Drain;
use crate::config::{Config, Devices, Inputs, Report};
use crate::exit::Exit;
use crate::transport::table::{self, Choice, FLAG_CHOICES};

/// Moves KV between a prefill and a decode engine.
///
/// A sidecar runs beside each vLLM instance. A sender beside the prefill engine pushes the KV of each prompt
/// into the landing buffer of the receiver beside the decode engine, so that the decode engine need not
/// compute this KV again.
#[derive(Debug, Parser)]
#[command(
    name = "sidecar",
    version,
    long_version = LONG_VERSION.as_str(),
    after_long_help = TEACHING,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

/// The task that the command line names.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs the sidecar. This is the default subcommand.
    Run(Run),
    /// Prints every value with its source, and every mistake. Starts nothing.
    CheckConfig(CheckConfig),
    /// Moves random chunks between a sender and a receiver in this process, checks them, and prints the speed.
    Selftest(Selftest),
    /// Examines this host, the configuration, peers and running programs, and names every fault with its cure.
    Doctor(Doctor),
    /// Makes a running sidecar take no new KV, for a prefill instance that is to be stopped. Decode sides can still
    /// fetch the KV that the engine keeps.
    Drain(Drain),
    /// Makes the key of this process, and prints the public key for the rosters of its peers. Or makes the keys of several
    /// processes, with their roster.
    Keygen(Keygen),
    /// Prints a script that completes this command line in a shell.
    Completions(Completions),
    /// Writes the manual pages of this program and its subcommands into a folder.
    #[command(hide = true)]
    Manual(Manual),
}

/// Arguments of `keygen`.
#[derive(Debug, Args)]
pub(crate) struct Keygen {
    /// The new file, for sidecar.key_file. An existing file is never replaced. With members, a folder.
    #[arg(value_name = "FILE|FOLDER")]
    path: PathBuf,
    /// Processes that get a key, for example prefill=sender@10.0.0.1. Each key becomes FOLDER/NAME.key, and
    /// FOLDER/roster.yaml lists all of them. The roles are sender, receiver and proxy; the hosts may be absent.
    #[arg(value_name = "NAME=ROLE[+ROLE][@HOST[,HOST]]")]
    members: Vec<Newcomer>,
    /// Several processes use each key, such as the pods of one Kubernetes deployment. Their ids begin with NAME-.
    #[arg(long, requires = "members")]
    replicas: bool,
}

/// Flags of a run.
#[derive(Debug, Default, Args)]
pub(crate) struct Run {
    /// LMCache's YAML file, with our keys below `sidecar:`. Default: $LMCACHE_CONFIG_FILE.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

/// Flags of `check-config`.
#[derive(Debug, Args)]
pub(crate) struct CheckConfig {
    /// The file. Default: $LMCACHE_CONFIG_FILE.
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Prints one JSON object instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
    /// Prints the tables of docs/reference/configuration.md, which explain every key, and checks nothing.
    #[arg(long, exclusive = true)]
    pub(crate) reference: bool,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

/// Flags of `selftest`.
#[derive(Debug, Args)]
pub(crate) struct Selftest {
    /// Duration of the test in seconds.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) seconds: u64,
    /// Transport to test; auto tests every transport that this host has.
    #[arg(long, value_name = FLAG_CHOICES, default_value = "auto", value_parser = choice)]
    pub(crate) transport: Choice,
    /// Memory of the sender's buffer. If the receiver's memory differs, add it after a comma. Default: host
    /// memory, and also the first two GPUs if there are any.
    #[arg(long, value_name = "cpu|cuda|cuda:N,cuda:M", value_parser = devices)]
    pub(crate) buffer_device: Option<Devices>,
    /// Bytes of a chunk.
    #[arg(long, value_name = "BYTES", default_value = "1MiB", value_parser = bytes)]
    pub(crate) chunk_bytes: u64,
    /// Bytes of each of the two buffers.
    #[arg(long, value_name = "BYTES", default_value = "64MiB", value_parser = bytes)]
    pub(crate) buffer_size: u64,
    /// Prints one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Flags that override keys of the configuration. The same types read the flags and the file, so that one
/// report has all mistakes.
#[derive(Debug, Default, Args)]
pub(crate) struct Overrides {
    /// Role of this sidecar: sender beside a prefill engine, receiver beside a decode engine.
    #[arg(long, value_name = "sender|receiver|both")]
    role: Option<String>,
    /// Receiver: address to which senders connect.
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// Receiver: port of the init handshake, one per rank.
    #[arg(long, value_name = "PORT[,PORT..]")]
    init_port: Option<String>,
    /// Receiver: port of the alloc requests, one per rank.
    #[arg(long, value_name = "PORT[,PORT..]")]
    alloc_port: Option<String>,
    /// The proxy's registration port. Not for LMCache's own proxy, which accepts no registrations.
    #[arg(long, value_name = "HOST:PORT")]
    proxy: Option<String>,
    /// Size of each rank's buffer, such as 4GiB.
    #[arg(long, value_name = "BYTES")]
    buffer_size: Option<String>,
    /// Memory of the buffers.
    #[arg(long, value_name = "cpu|cuda[:N]")]
    buffer_device: Option<String>,
    /// Path of the unix socket to which the engine connects.
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// Address of the admin server.
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<String>,
    /// Transports that the sidecar may use; auto is all of them.
    #[arg(long, value_name = FLAG_CHOICES)]
    transport: Option<String>,
    /// Base URL of the engine's OpenAI server.
    #[arg(long, value_name = "URL")]
    engine_url: Option<String>,
    /// Name of this sidecar.
    #[arg(long, value_name = "NAME")]
    id: Option<String>,
    /// Rule for peers without a key: no peer has a key, peers may have no key, every peer must prove a key.
    #[arg(long, value_name = "off|prefer|require")]
    auth: Option<String>,
    /// File with this process's private key.
    #[arg(long, value_name = "FILE")]
    key_file: Option<String>,
    /// File with the public keys of all peers.
    #[arg(long, value_name = "FILE")]
    roster: Option<String>,
    /// Lets ports listen beyond this machine without authentication.
    #[arg(long)]
    insecure: bool,
    /// Log level: error, warn, info, debug, trace, or directives like info,sidecar=debug.
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Format of log lines.
    #[arg(long, value_name = "text|json")]
    log_format: Option<String>,
    /// Longest time that the sidecar waits for requests to end after SIGTERM. For KV that decode sides may still fetch,
    /// sidecar.max_keep_ms is the limit.
    #[arg(long, value_name = "MS")]
    drain_timeout: Option<String>,
    /// File to which the sidecar writes the events and actions of the protocol machines, to replay them.
    #[arg(long, value_name = "FILE")]
    trace: Option<String>,
    /// Pushes no KV, so that the decode engine computes every prompt itself. For tests.
    #[arg(long, hide = true)]
    no_push: bool,
}

impl Overrides {
    /// Returns the given flags with their dashes, and their values.
    pub(crate) fn flags(&self) -> Vec<(&'static str, String)> {
        let switch = |on: bool, value: &str| on.then(|| value.to_owned());
        [
            ("--role", self.role.clone()),
            ("--host", self.host.clone()),
            ("--init-port", self.init_port.clone()),
            ("--alloc-port", self.alloc_port.clone()),
            ("--proxy", self.proxy.clone()),
            ("--buffer-size", self.buffer_size.clone()),
            ("--buffer-device", self.buffer_device.clone()),
            ("--socket", self.socket.clone()),
            ("--admin", self.admin.clone()),
            ("--transport", self.transport.clone()),
            ("--engine-url", self.engine_url.clone()),
            ("--id", self.id.clone()),
            ("--auth", self.auth.clone()),
            ("--key-file", self.key_file.clone()),
            ("--roster", self.roster.clone()),
            ("--insecure", switch(self.insecure, "on")),
            ("--log-level", self.log_level.clone()),
            ("--log-format", self.log_format.clone()),
            ("--drain-timeout", self.drain_timeout.clone()),
            ("--trace", self.trace.clone()),
            ("--no-push", switch(self.no_push, "off")),
        ]
        .into_iter()
        .filter_map(|(flag, value)| Some((flag, value?)))
        .collect()
    }
}

impl Cli {
    /// Reads the command line of this process. If the user asks for the help or the version, or the command
    /// line is wrong, prints the help, the version or the mistakes.
    ///
    /// # Errors
    /// The exit code of the process.
    pub(crate) fn of_process() -> Result<Command, Exit> {
        match Self::try_parse() {
            Ok(cli) => Ok(cli.command.unwrap_or(Command::Run(cli.run))),
            Err(error) => {
                // If the output is closed, the user cannot see any message, so this error is ignored.
                error.print().ok();
                Err(if error.use_stderr() {
                    Exit::Usage
                } else {
                    Exit::Ok
                })
            }
        }
    }
}

/// Prints the completions of this program.
pub(crate) fn complete(shell: &Completions) -> Exit {
    shell.print(Cli::command());
    Exit::Ok
}

/// Writes the manual pages of this program.
pub(crate) fn manual(pages: &Manual) -> Exit {
    match pages.write(Cli::command()) {
        Ok(()) => Exit::Ok,
        Err(error) => {
            eprintln!("error: cannot write the manual pages: {error}");
            Exit::Unavailable
        }
    }
}

impl Run {
    /// Loads the configuration of this run and prints its mistakes.
    ///
    /// # Errors
    /// The exit code of the process.
    pub(crate) fn load(&self) -> Result<(Config, Report), Exit> {
        let inputs = inputs(&self.overrides, self.config.clone())?;
        Config::load(&inputs).map_err(|report| {
            eprint!("{}", report.errors());
            Exit::Usage
        })
    }
}

impl Keygen {
    /// Makes the files and prints the public keys.
    pub(crate) fn run(&self) -> Exit {
        let made = if self.members.is_empty() {
            keygen(&self.path)
                .map(|public| vec![public])
                .map_err(|e| e.to_string())
        } else {
            keygen_all(&self.path, &self.members, self.replicas)
        };
        match made {
            Ok(keys) => {
                say(&keys
                    .iter()
                    .map(|key| format!("{key}\n"))
                    .collect::<String>());
                Exit::Ok
            }
            Err(error) => {
                eprintln!("error: {error}");
                Exit::Usage
            }
        }
    }
}

impl CheckConfig {
    /// Prints the report. Mistakes go to standard error, and the exit code is then 64.
    pub(crate) fn run(&self) -> Exit {
        if self.reference {
            say(&crate::config::reference());
            return Exit::Ok;
        }
        let inputs = match inputs(&self.overrides, self.file.clone()) {
            Ok(inputs) => inputs,
            Err(exit) => return exit,
        };
        let report = match Config::load(&inputs) {
            Ok((_, report)) => report,
            Err(report) => *report,
        };
        if self.json {
            say(&format!("{:#}\n", report.json()));
        } else {
            say(&report.to_string());
        }
        if report.problems.is_empty() {
            return Exit::Ok;
        }
        eprint!("{}", report.errors());
        Exit::Usage
    }
}

/// Prints to standard output. A closed pipe, for example to `head`, is not an error.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .ok();
}

fn inputs(overrides: &Overrides, file: Option<PathBuf>) -> Result<Inputs, Exit> {
    Inputs::of_process(overrides.flags(), file).map_err(|error| {
        eprintln!("error: {error}");
        Exit::Usage
    })
}

fn choice(text: &str) -> Result<Choice, String> {
    crate::config::read(text)
}

fn devices(text: &str) -> Result<Devices, String> {
    crate::config::read(text)
}

fn bytes(text: &str) -> Result<u64, String> {
    crate::config::read::<crate::config::Bytes>(text).map(|bytes| bytes.0)
}

static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    format!(
        "{}\nprotocol {}\ntransports {}\n\
         memory cpu, cuda",
        env!("CARGO_PKG_VERSION"),
        protocol::VERSION,
        table::origins()
    )
});

const TEACHING: &str = "\
Examples:
  Beside the decode engine, on this machine:
    sidecar --config configs/lmcache-decoder-config.yaml
  Beside the prefill engine:
    sidecar --config configs/lmcache-prefiller-config.yaml
  Beside a prefill engine on the first GPU (the buffer must be in the memory of that GPU):
    sidecar --config configs/lmcache-prefiller-config.yaml --buffer-device cuda
  Without a configuration file:
    sidecar --role receiver --host 127.0.0.1 --init-port 7300 --alloc-port 7400 \\
            --buffer-size 4GiB --proxy 127.0.0.1:7500
  Print the values in use and their sources:
    sidecar check-config configs/lmcache-decoder-config.yaml --buffer-size 1GiB
  Look for faults of this host and of the configuration, before the first start:
    sidecar doctor configs/lmcache-decoder-config.yaml
  Test that this machine moves bytes:
    sidecar selftest --seconds 3
  Make a key for peers that know each other, and print the public key for the roster:
    sidecar keygen /etc/pd-sidecar/key
  Make the keys of a pair and of its proxy, and the roster that lists them:
    sidecar keygen keys prefill=sender@10.0.0.1 decode=receiver@10.0.0.2 front=proxy@10.0.0.1
  Before a prefill engine is stopped, wait until decode sides have fetched the KV that it keeps:
    sidecar drain --until-fetched

Precedence:
  A flag wins over an environment variable, a variable over the file, the file over the default.
  Each key of LMCache has the variable LMCACHE_<KEY>, each key below `sidecar:` the variable
  PD_SIDECAR_<KEY>, in capitals. An empty variable counts as absent. UCX_* and NIXL_* go to UCX and
  NIXL unchanged; if UCX_TLS is not set, UCX gets no TCP (see sidecar.nixl_over_tcp).

Exit codes:
   0  done, or drained after SIGTERM or SIGINT; the doctor has found nothing
   1  the doctor has found warnings, but no error
   2  the doctor has found an error
  64  the command line or the configuration is wrong; every mistake is printed
  69  a port, a socket, memory or a required transport is not available
  70  a bug; please report it with the log
  75  requests were still under way when --drain-timeout passed, or KV was not fetched in time";

#[cfg(test)]
mod tests;
