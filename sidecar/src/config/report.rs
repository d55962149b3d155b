//! The report that `check-config` prints and that each start logs: every value with its source, the keys that
//! are ignored, the variables that are passed through, and the mistakes.

use std::fmt::{self, Write};

use serde_json::json;

use super::Channel;
use super::layers::Layers;
use super::lmcache::Ignored;
use super::problem::{Problem, Row};

/// The values of a configuration with their sources, and all messages for the user.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    /// Every key with its value and source.
    pub(crate) rows: Vec<Row>,
    /// Every channel with its protection; empty if a mistake hides the channels.
    pub(crate) channels: Vec<Channel>,
    /// LMCache's keys that were given and have no effect.
    pub(crate) ignored: Vec<Ignored>,
    /// LMCache's keys that this version does not know. A newer LMCache may know these keys.
    pub(crate) unknown: Vec<String>,
    /// Variables that UCX and NIXL read, with their values. The sidecar does not read these variables.
    pub(crate) passed: Vec<(String, String)>,
    /// Warnings for the user.
    pub(crate) warnings: Vec<String>,
    /// The mistakes that were found.
    pub(crate) problems: Vec<Problem>,
}

impl Report {
    pub(super) fn new(
        layers: Layers,
        channels: Vec<Channel>,
        ignored: Vec<Ignored>,
        unknown: Vec<String>,
        env: &[(String, String)],
    ) -> Self {
        let mut passed: Vec<_> = env
            .iter()
            .filter(|(name, _)| PASSED.iter().any(|prefix| name.starts_with(prefix)))
            .cloned()
            .collect();
        passed.sort();
        Self {
            rows: layers.rows,
            channels,
            ignored,
            unknown,
            passed,
            warnings: layers.warnings,
            problems: layers.problems,
        }
    }

    /// Returns one line per mistake and a last line with the next step. The process prints these lines on
    /// standard error and exits with code 64.
    pub(crate) fn errors(&self) -> String {
        let mut text = String::new();
        for problem in &self.problems {
            writeln!(text, "error: {problem}").expect("a String takes every write");
        }
        let n = self.problems.len();
        let noun = if n == 1 { "mistake" } else { "mistakes" };
        writeln!(
            text,
            "{n} {noun} in the configuration; docs/reference/configuration.md explains every key"
        )
        .expect("a String takes every write");
        text
    }

    /// Returns the report as JSON, for programs.
    pub(crate) fn json(&self) -> serde_json::Value {
        json!({
            "ok": self.problems.is_empty(),
            "values": self.rows.iter().map(|row| json!({
                "key": row.key, "value": row.value, "source": row.source,
            })).collect::<Vec<_>>(),
            "channels": self.channels,
            "ignored": self.ignored.iter().map(|i| json!({
                "key": i.key, "value": i.value, "source": i.source, "why": i.why,
            })).collect::<Vec<_>>(),
            "unknown": self.unknown,
            "passed_through": self.passed.iter().map(|(name, value)| json!({
                "name": name, "value": value,
            })).collect::<Vec<_>>(),
            "warnings": self.warnings,
            "errors": self.problems.iter().map(|p| json!({
                "place": p.place, "key": p.key, "value": p.value, "what": p.what, "right": p.right,
            })).collect::<Vec<_>>(),
        })
    }

    /// Logs the report at the start: warnings, ignored keys and variables that are passed through. At level
    /// debug, every value is logged, too.
    pub(crate) fn log(&self) {
        for row in &self.rows {
            tracing::debug!(key = row.key, value = row.value, source = row.source);
        }
        for warning in &self.warnings {
            tracing::warn!("{warning}");
        }
        for ignored in &self.ignored {
            tracing::info!(
                key = ignored.key,
                value = ignored.value,
                source = ignored.source,
                "ignored: {}",
                ignored.why
            );
        }
        for key in &self.unknown {
            tracing::warn!(key, "unknown key ignored");
        }
        for (name, value) in &self.passed {
            tracing::info!(name, value, "passed through to UCX and NIXL");
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = self
            .rows
            .iter()
            .map(|r| [r.key.as_str(), &r.value, &r.source]);
        table(f, ["KEY", "VALUE", "SOURCE"], &rows.collect::<Vec<_>>())?;
        if !self.channels.is_empty() {
            writeln!(f, "\nChannels:")?;
            let rows = self.channels.iter();
            let rows = rows.map(|c| [c.name.as_str(), &c.address, &c.protection]);
            table(
                f,
                ["CHANNEL", "ADDRESS", "PROTECTION"],
                &rows.collect::<Vec<_>>(),
            )?;
        }
        if !self.ignored.is_empty() {
            writeln!(f, "\nIgnored:")?;
            let rows = self
                .ignored
                .iter()
                .map(|i| [i.key.as_str(), &i.value, i.why]);
            table(f, ["KEY", "VALUE", "BECAUSE"], &rows.collect::<Vec<_>>())?;
        }
        if !self.unknown.is_empty() {
            writeln!(f, "\nUnknown and ignored: {}", self.unknown.join(", "))?;
        }
        if !self.passed.is_empty() {
            writeln!(f, "\nPassed through to UCX and NIXL:")?;
            for (name, value) in &self.passed {
                writeln!(f, "  {name}={value}")?;
            }
        }
        for warning in &self.warnings {
            writeln!(f, "\nwarning: {warning}")?;
        }
        Ok(())
    }
}

fn table(f: &mut fmt::Formatter<'_>, head: [&str; 3], rows: &[[&str; 3]]) -> fmt::Result {
    let width = |i: usize| {
        rows.iter()
            .map(|row| row[i].len())
            .chain([head[i].len()])
            .max()
            .unwrap_or(0)
    };
    let (first, second) = (width(0), width(1).min(48));
    for [a, b, c] in std::iter::once(&head).chain(rows) {
        writeln!(f, "{}", format!("{a:first$}  {b:second$}  {c}").trim_end())?;
    }
    Ok(())
}

/// Prefixes of the variables that are passed through.
const PASSED: &[&str] = &["UCX_", "NIXL_"];
