//! The command line.

mod remote;

use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Parser, Subcommand};
use common::host::{bare, is_loopback};
use common::manual::{Completions, Manual};
use ipnet::IpNet;
use store::cache::{Disk, Sizes};
use store::daemon::Settings;
use store::entry::MAX_VALUE_BYTES;
use store::lm::Bounds;

use self::remote::RemoteFlags;

/// Keeps KV for engines: in memory, on disk below it, and in a distributed store below both.
#[derive(Debug, Parser)]
#[command(
    name = "pd-store",
    version,
    after_long_help = TEACHING,
    args_conflicts_with_subcommands = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
    /// Address of the lm:// port. Beyond this machine, --allow must name the clients' networks.
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:65432",
        env = "PD_STORE_LISTEN"
    )]
    listen: String,
    /// Network whose clients may connect, such as 10.1.0.0/16. May be given several times. This machine may always.
    #[arg(
        long,
        value_name = "NETWORK",
        value_delimiter = ',',
        env = "PD_STORE_ALLOW"
    )]
    allow: Vec<IpNet>,
    /// Bytes of the values in memory. Values on their way to or from clients and the disk come on top:
    /// --in-flight, 32 times --max-value, with --disk 8 times --max-value or 300 MiB, and with --remote --remote-queue and
    /// 60 times --max-value.
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "4GiB",
        env = "PD_STORE_MEMORY"
    )]
    memory: ByteSize,
    /// Folder for values on disk. Each value is written there when it is put, and is found again after a restart.
    #[arg(
        long,
        value_name = "FOLDER",
        requires = "disk_size",
        env = "PD_STORE_DISK"
    )]
    disk: Option<PathBuf>,
    /// Bytes of all files in the folder.
    #[arg(
        long,
        value_name = "BYTES",
        requires = "disk",
        env = "PD_STORE_DISK_SIZE"
    )]
    disk_size: Option<ByteSize>,
    /// Life of a value, such as 6h. Without it, values live until newer values need their room.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, env = "PD_STORE_TTL")]
    ttl: Option<Duration>,
    /// Bytes of the largest value. LMCache's chunk of 256 tokens is one value.
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "64MiB",
        env = "PD_STORE_MAX_VALUE"
    )]
    max_value: ByteSize,
    /// Bytes of all values that are being received or sent.
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "1GiB",
        env = "PD_STORE_IN_FLIGHT"
    )]
    in_flight: ByteSize,
    /// Bytes per second that a client must send or read at least, after the first ten seconds of a value.
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "1MiB",
        env = "PD_STORE_LEAST_RATE"
    )]
    least_rate: ByteSize,
    /// Number of connections. If there are more, the oldest is closed.
    #[arg(long, value_name = "NUMBER", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..), env = "PD_STORE_CONNECTIONS")]
    connections: u32,
    /// Address of the admin server: /health, /ready, /metrics.
    #[arg(
        long,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:7920",
        env = "PD_STORE_ADMIN"
    )]
    admin: String,
    /// Time for requests that have begun when the store stops, and then for values that wait for the remote store.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration, env = "PD_STORE_GRACE")]
    grace: Duration,
    /// Log level: error, warn, info, debug, trace, or directives like info,store=debug.
    #[arg(
        long,
        value_name = "LEVEL",
        default_value = "info",
        env = "PD_STORE_LOG_LEVEL"
    )]
    pub(crate) log_level: String,
    /// Checks all flags and files, writes a value to the remote store and reads it, and ends.
    #[arg(long)]
    pub(crate) check_config: bool,
    #[command(flatten)]
    remote: RemoteFlags,
}

/// A task other than to run the store.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Prints a script that completes this command line in a shell.
    Completions(Completions),
    /// Writes the manual pages of this program into a folder.
    #[command(hide = true)]
    Manual(Manual),
}

impl Cli {
    /// Checks the values, and returns the settings.
    ///
    /// # Errors
    /// The flag, its mistake and the cure.
    pub(crate) fn settings(self) -> Result<Settings, String> {
        let bytes = |flag: &str, size: ByteSize| {
            usize::try_from(size.as_u64())
                .map_err(|_| format!("{flag} {size} is more than this machine can address"))
        };
        let max_value = bytes("--max-value", self.max_value)?;
        if !(1..=MAX_VALUE_BYTES).contains(&max_value) {
            return Err(format!(
                "--max-value {} must be from 1 to {MAX_VALUE_BYTES} bytes",
                self.max_value
            ));
        }
        let memory = bytes("--memory", self.memory)?;
        let in_flight = bytes("--in-flight", self.in_flight)?;
        for (flag, size) in [("--memory", memory), ("--in-flight", in_flight)] {
            if size / 4 < max_value {
                return Err(format!(
                    "{flag} {size} must be at least four times --max-value ({max_value})"
                ));
            }
        }
        if self.allow.is_empty() && !is_local(&self.listen) {
            return Err(format!(
                "--listen {}: the lm:// protocol has no keys, so anyone who reaches the port can read and replace \
                 KV. Name the networks of the clients: --allow 10.1.0.0/16",
                self.listen
            ));
        }
        let disk = match (self.disk, self.disk_size) {
            (Some(folder), Some(size)) => Some(Disk {
                folder,
                bytes: bytes("--disk-size", size)?,
            }),
            _ => None,
        };
        Ok(Settings {
            listen: self.listen,
            admin: self.admin,
            remote: self.remote.settings(max_value)?,
            sizes: Sizes {
                memory,
                disk,
                max_value,
                ttl: self.ttl,
            },
            bounds: Bounds {
                max_value,
                in_flight,
                least_rate: self.least_rate.as_u64(),
                connections: self.connections as usize,
                allow: self.allow,
            },
            grace: self.grace,
        })
    }
}

/// Returns true if only this machine can reach the address.
fn is_local(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    is_loopback(bare(host))
}

const TEACHING: &str = "\
Examples:
  On this machine, in memory only:
    pd-store --memory 16GiB
  For the engines of a network, with a disk and a life of six hours:
    pd-store --listen 0.0.0.0:65432 --allow 10.1.0.0/16 --memory 64GiB \\
             --disk /var/lib/pd-store --disk-size 500GiB --ttl 6h
  With a bucket below memory and disk, after a check:
    pd-store --memory 64GiB --remote s3://kv-cache --remote-endpoint http://10.1.0.9:9000 \
             --remote-credentials /etc/pd-store/s3 --check-config
  In LMCache's configuration file of each engine:
    remote_url: \"lm://10.1.0.7:65432\"
    remote_serde: \"naive\"

Exit codes:
   0  stopped by SIGTERM or SIGINT
  64  the command line is wrong
  69  a port, the folder or the remote store is not available";

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(args: &[&str]) -> Result<Settings, String> {
        let args = ["pd-store"].iter().chain(args);
        Cli::try_parse_from(args)
            .map_err(|error| error.to_string())?
            .settings()
    }

    #[test]
    fn the_defaults_are_complete() {
        let settings = settings(&[]).unwrap();
        assert_eq!(settings.sizes.memory, 4 << 30);
        assert_eq!(settings.bounds.max_value, 64 << 20);
        assert!(settings.sizes.disk.is_none());
    }

    #[test]
    fn a_port_beyond_this_machine_needs_the_networks_of_its_clients() {
        for open in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "host:1"] {
            let error = settings(&["--listen", open]).unwrap_err();
            assert!(error.contains("--allow"), "{error}");
        }
        let allowed = settings(&["--listen", "0.0.0.0:1", "--allow", "10.0.0.0/8,::1/128"]);
        assert_eq!(allowed.unwrap().bounds.allow.len(), 2);
        for own in ["127.0.0.1:1", "[::1]:1", "localhost:1"] {
            settings(&["--listen", own]).unwrap();
        }
    }

    #[test]
    fn a_mistake_names_its_flag() {
        for (args, flag) in [
            (&["--max-value", "3GiB"][..], "--max-value"),
            (&["--memory", "100MiB"], "--memory"),
            (&["--in-flight", "1MiB"], "--in-flight"),
            (&["--disk", "/tmp/x"], "--disk-size"),
            (&["--ttl", "soon"], "--ttl"),
            (&["--allow", "10.0.0.0/99"], "--allow"),
            (&["--remote", "cache:6379"], "--remote"),
            (
                &["--remote", "redis://a:1", "--remote-endpoint", "http://b"],
                "s3:// only",
            ),
            (&["--remote-endpoint", "http://b"], "--remote <URL>"),
            (
                &["--remote", "s3://kv-cache", "--remote-prefix", "a/../b"],
                "--remote-prefix",
            ),
            (
                &["--remote", "s3://kv-cache", "--remote-timeout", "0s"],
                "--remote-timeout",
            ),
            (
                &["--remote", "s3://kv-cache", "--remote-queue", "64MiB"],
                "--remote-queue",
            ),
            (
                &[
                    "--remote",
                    "s3://kv-cache",
                    "--remote-credentials",
                    "/absent",
                ],
                "no such file",
            ),
        ] {
            let error = settings(args).unwrap_err();
            assert!(error.contains(flag), "{args:?}: {error}");
        }
        let secret = settings(&["--remote", "redis://user:hunter2@cache:6379"]).unwrap_err();
        assert!(secret.contains("--remote-credentials") && !secret.contains("hunter2"));
    }
}
