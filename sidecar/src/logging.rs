//! Log lines on standard error: for people, or one JSON object each.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Starts the log. The checks of the configuration have already accepted `directives`. `RUST_LOG` is not
/// read, because `check-config` must show the value in use and its source.
pub(crate) fn start(directives: &str, format: LogFormat) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(directives))
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal());
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}
