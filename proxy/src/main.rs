//! `pd-proxy`: OpenAI-compatible proxy for disaggregated prefill and decode.

use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::ErrorKind;
use mimalloc::MiMalloc;
use proxy::{Command, Config, End, LogFormat, Proxy, Stop, raise_limit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::task::AbortOnDropHandle;
use tracing::info;
use tracing_subscriber::EnvFilter;

/// A request allocates and frees small pieces in several threads, for which this allocator needs less time than the C
/// library's.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Does the task that the command line names instead of running the proxy.
fn obey(command: &Command) -> ExitCode {
    match command {
        Command::Keygen { file } => match proxy::keygen(file) {
            Ok(public) => {
                println!("{public}");
                ExitCode::SUCCESS
            }
            Err(error) => print_problems(&[error.to_string()], USAGE),
        },
        Command::Completions(shell) => {
            shell.print(Config::command());
            ExitCode::SUCCESS
        }
        Command::Manual(pages) => match pages.write(Config::command()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => print_problems(
                &[format!("cannot write the manual pages: {error}")],
                UNAVAILABLE,
            ),
        },
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let (config, ignored) = match Config::of_process() {
        Ok(read) => read,
        Err(e) => {
            let asked = matches!(e.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            // Ignore a failed write: a closed terminal must not change the exit code.
            drop(e.print());
            return ExitCode::from(if asked { 0 } else { USAGE });
        }
    };
    if let Some(command) = &config.command {
        return obey(command);
    }
    // Report all problems of the flags at once, before a port is opened.
    let mut problems = config.problems();
    let filter = EnvFilter::try_new(&config.log);
    problems.extend(
        filter
            .as_ref()
            .err()
            .map(|e| format!("--log {}: {e}", config.log)),
    );
    let (Ok(filter), []) = (filter, &problems[..]) else {
        return print_problems(&problems, USAGE);
    };
    // Without `log_internal_errors(false)`, the subscriber would report a failed write on standard error,
    // and panic if standard error is closed.
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false);
    match config.log_format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    for note in ignored {
        tracing::warn!("{note}");
    }
    // Handle signals before the ports are open: a SIGTERM right after the start must drain, too.
    let signals = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
        signal(SignalKind::user_defined1()),
    );
    let (Ok(mut term), Ok(mut int), Ok(mut usr1)) = signals else {
        return print_problems(&["the process cannot handle signals".into()], INTERNAL);
    };
    // Raise the limit on open files before the first connection. Log the warning about a low limit only
    // after the line `pd-proxy is up`.
    let shortage = raise_limit(&config);
    let insecure = config.addresses.insecure;
    let proxy = match Proxy::bind(config).await {
        Ok(proxy) => proxy,
        Err(e) => return print_problems(&[e.to_string()], UNAVAILABLE),
    };
    info!(listen = %proxy.listen(), registration = %proxy.registration(),
          version = env!("CARGO_PKG_VERSION"), "pd-proxy is up");
    if let Some(shortage) = shortage {
        tracing::warn!("{shortage}");
    }
    if insecure {
        tracing::warn!(
            "--insecure: every process that reaches the registration port can register an instance, which then gets requests"
        );
    }
    // The first signal drains the proxy. The second signal ends the requests that are still in flight.
    let stop = Stop::default();
    let told = stop.clone();
    let signals = AbortOnDropHandle::new(tokio::spawn(async move {
        told_to_stop(&mut term, &mut int).await;
        told.drain.cancel();
        told_to_stop(&mut term, &mut int).await;
        told.now.cancel();
    }));
    let summarise = proxy.summariser();
    let asked = AbortOnDropHandle::new(tokio::spawn(async move {
        while usr1.recv().await.is_some() {
            summarise();
        }
    }));
    let end = proxy.run(stop).await;
    drop((signals, asked));
    match end {
        End::Drained => ExitCode::SUCCESS,
        End::ForcedShutdown => ExitCode::FAILURE,
        End::PortFailed => ExitCode::from(INTERNAL),
    }
}

/// Waits for SIGTERM or SIGINT.
async fn told_to_stop(term: &mut Signal, int: &mut Signal) {
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// Prints each problem on its own line and returns the exit code.
fn print_problems(problems: &[String], code: u8) -> ExitCode {
    for problem in problems {
        eprintln!("pd-proxy: {problem}");
    }
    ExitCode::from(code)
}

/// The exit codes, with the numbers of sysexits.h; --help lists them.
const USAGE: u8 = 64;
const UNAVAILABLE: u8 = 69;
const INTERNAL: u8 = 70;
