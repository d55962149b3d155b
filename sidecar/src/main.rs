//! The sidecar beside a vLLM instance.

mod cli;
mod config;
mod engines;
mod host;
mod init;
mod local;
mod memory;
mod node;
mod port;
mod receiver;
mod selftest;
mod sender;
mod side;
mod trace;
mod transport;
mod wires;
mod zmq;

use std::process::ExitCode;
use std::sync::Arc;

use crate::cli::{Cli, Command, Exit};
use crate::config::Config;
use crate::node::Node;

fn main() -> ExitCode {
    match Cli::of_process() {
        Ok(Command::CheckConfig(check)) => check.run(),
        Ok(Command::Run(args)) => match args.load() {
            Ok((config, report)) => {
                tracing_subscriber::fmt()
                    .with_env_filter(config.log_level.clone())
                    .init();
                report.log();
                run(config)
            }
            Err(exit) => exit,
        },
        Ok(Command::Selftest(selftest)) => selftest.run(),
        Err(exit) => exit,
    }
    .into()
}

#[derive(Debug)]
struct NoShow;
impl side::Shown for NoShow {
    fn record(&self, _: side::Side, _: u32, _: &protocol::record::Record) {}
    fn gauges(&self, _: side::Side, _: u32, _: side::Gauges<'_>) {}
    fn links(&self, _: u32, _: &mut dyn Iterator<Item = &side::LinkStatus>) {}
    fn malformed(&self, _: &'static str) {}
    fn tell_proxy(&self, _: &protocol::registration::ToProxy) {}
}

#[tokio::main(flavor = "current_thread")]
async fn run(config: Config) -> Exit {
    let node = match Node::start(Arc::new(config), Arc::new(NoShow)).await {
        Ok(node) => node,
        Err(error) => {
            eprintln!("{error:#}");
            return Exit::Unavailable;
        }
    };
    node.run().await;
    Exit::Ok
}
