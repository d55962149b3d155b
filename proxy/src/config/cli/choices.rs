//! The values of flags that take one of several names.

use clap::ValueEnum;

/// The time at which the proxy sends a decode leg, if both instances have sidecars.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DecodeLegAt {
    /// When the prefill engine has begun.
    Begun,
    /// With the prefill leg.
    Arrival,
    /// After the prefill leg's answer.
    Answer,
}

/// The engine that gives the first token of a streamed answer, if both instances have
/// sidecars.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FirstTokenFrom {
    /// The decode engine.
    Decode,
    /// The prefill engine.
    Prefill,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}
