//! (being written)

mod cli;
mod config;

use std::process::ExitCode;

use crate::cli::{Cli, Command, Exit};

fn main() -> ExitCode {
    match Cli::of_process() {
        Ok(Command::CheckConfig(check)) => check.run(),
        Ok(Command::Run(run)) => run.load().map_or_else(
            |exit| exit,
            |(config, report)| {
                report.log();
                println!("{config:?}");
                Exit::Ok
            },
        ),
        Ok(Command::Selftest(_)) => Exit::Unavailable,
        Err(exit) => exit,
    }
    .into()
}
