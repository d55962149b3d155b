//! The sidecar beside a vLLM instance: arguments, configuration, run, drain, exit code.

mod admin;
mod cli;
mod config;
mod cuda;
mod daemon;
mod engines;
mod host;
mod init;
mod lineage;
mod local;
mod logging;
mod lookout;
mod memory;
mod metrics;
mod node;
mod port;
mod receiver;
mod registration;
mod selftest;
mod sender;
mod shown;
mod side;
mod status;
mod trace;
mod transport;
mod wires;
mod zmq;

use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use crate::cli::{Cli, Command, Exit};

fn main() -> ExitCode {
    let exit = match Cli::of_process() {
        Ok(Command::CheckConfig(check)) => check.run(),
        Ok(Command::Selftest(selftest)) => selftest.run(),
        Ok(Command::Run(args)) => match args.load() {
            Ok((config, report)) => {
                if let Some(exit) = environment(&config.ucx) {
                    return exit.into();
                }
                logging::start(&config.log_level, config.log_format);
                report.log();
                daemon::run(config)
            }
            Err(exit) => exit,
        },
        Err(exit) => exit,
    };
    exit.into()
}

/// Begins anew with UCX's variables, which it reads when it is loaded, if they are not set: this
/// process may have threads that read the environment, so it is not changed underneath them.
fn environment(ucx: &[(&'static str, String)]) -> Option<Exit> {
    let missing: Vec<_> = ucx
        .iter()
        .filter(|(name, _)| std::env::var_os(name).is_none())
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    if missing.is_empty() {
        return None;
    }
    let error = std::process::Command::new("/proc/self/exe")
        .arg0(std::env::args_os().next().unwrap_or_default())
        .args(std::env::args_os().skip(1))
        .envs(missing)
        .exec();
    eprintln!("error: cannot begin anew with UCX's variables: {error}");
    Some(Exit::Unavailable)
}
