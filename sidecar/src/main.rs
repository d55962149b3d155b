//! The sidecar process beside a vLLM instance: arguments, configuration, run, drain, exit code.

mod cli;
mod config;
mod daemon;
mod doctor;
mod engine;
mod exit;
mod logging;
mod memory;
mod net;
mod observe;
mod peer;
mod rank;
mod selftest;
mod transport;

use crate::cli::{Cli, Command};
use crate::transport::environment;

fn main() {
    let exit = match Cli::of_process() {
        Ok(Command::CheckConfig(check)) => check.run(),
        Ok(Command::Completions(shell)) => cli::complete(&shell),
        Ok(Command::Manual(pages)) => cli::manual(&pages),
        Ok(Command::Doctor(doctor)) => doctor.run(),
        Ok(Command::Drain(drain)) => drain.run(),
        Ok(Command::Keygen(keygen)) => keygen.run(),
        Ok(Command::Selftest(selftest)) => match selftest.ucx() {
            Ok(ucx) => environment::prepare(&ucx).unwrap_or_else(|| selftest.run()),
            Err(exit) => exit,
        },
        Ok(Command::Run(args)) => match args.load() {
            Ok((config, report)) => {
                if let Some(exit) = environment::prepare(&config.ucx) {
                    exit.end_process();
                }
                logging::start(&config.log_level, config.log_format);
                report.log();
                daemon::run(config)
            }
            Err(exit) => exit,
        },
        Err(exit) => exit,
    };
    exit.end_process()
}
