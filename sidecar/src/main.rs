//! The sidecar beside a vLLM instance: arguments, configuration, run, drain, exit code.

mod admin;
mod cli;
mod config;
mod cuda;
mod daemon;
mod engines;
mod exit;
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
mod sockets;
mod status;
mod trace;
mod transport;
mod ucx;
mod wires;
mod zmq;

use std::process::ExitCode;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let exit = match Cli::of_process() {
        Ok(Command::CheckConfig(check)) => check.run(),
        Ok(Command::Selftest(selftest)) => match selftest.ucx() {
            Ok(ucx) => ucx::environment(&ucx).unwrap_or_else(|| selftest.run()),
            Err(exit) => exit,
        },
        Ok(Command::Run(args)) => match args.load() {
            Ok((config, report)) => {
                if let Some(exit) = ucx::environment(&config.ucx) {
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
