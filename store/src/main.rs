//! The store's process: command line, log, exit code.

mod cli;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tracing::error;
use tracing_subscriber::EnvFilter;

use crate::cli::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // If the output is closed, the user cannot see any message, so this error is ignored.
            error.print().ok();
            return if error.use_stderr() { USAGE } else { 0 }.into();
        }
    };
    match &cli.command {
        None => {}
        Some(Command::Completions(shell)) => {
            shell.print(Cli::command());
            return ExitCode::SUCCESS;
        }
        Some(Command::Manual(pages)) => {
            return match pages.write(Cli::command()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("error: cannot write the manual pages: {error}");
                    UNAVAILABLE.into()
                }
            };
        }
    }
    let (log, checks) = (cli.log_level.clone(), cli.check_config);
    let settings = match cli.settings() {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("error: {error}");
            return USAGE.into();
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("{QUIET},{log}")))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let ended = match runtime {
        Ok(runtime) if checks => runtime
            .block_on(store::daemon::check(settings))
            .map(|lines| println!("{}", lines.join("\n")))
            .map_err(|error| error.to_string()),
        Ok(runtime) => runtime
            .block_on(store::daemon::run(settings))
            .map_err(|error| error.to_string()),
        Err(error) => Err(format!("cannot start threads: {error}")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            error!("{text}");
            UNAVAILABLE.into()
        }
    }
}

/// The cache's library logs how it builds itself, in words that sound like faults. A later directive for the same target
/// wins, so the user can still ask for these lines.
const QUIET: &str = "foyer=warn,foyer_memory=warn,foyer_storage=warn";
/// The exit code of a wrong command line, as in `sysexits.h`.
const USAGE: u8 = 64;
/// The exit code if a port, a folder or the remote store is not available.
const UNAVAILABLE: u8 = 69;
