//! The doctor's report, as text for people and as JSON for programs.

use std::fmt::{self, Write};

use serde_json::json;

use super::finding::{Results, Severity};
use crate::exit::Exit;

/// The findings in order: errors first.
#[derive(Debug)]
pub(super) struct Report {
    results: Results,
    /// Number of findings that `--ignore` has left out.
    ignored: usize,
}

impl Report {
    /// Sorts the findings, and leaves out those whose codes are ignored.
    pub(super) fn new(mut results: Results, ignore: &[String]) -> Self {
        let before = results.findings.len();
        results
            .findings
            .retain(|finding| !ignore.iter().any(|code| code == finding.code));
        results.findings.sort_by_key(|finding| finding.severity);
        let ignored = before - results.findings.len();
        Self { results, ignored }
    }

    /// Returns the exit code: that of the heaviest finding.
    pub(super) fn exit(&self) -> Exit {
        match self
            .results
            .findings
            .first()
            .map(|finding| finding.severity)
        {
            None => Exit::Ok,
            Some(Severity::Warning) => Exit::Warnings,
            Some(Severity::Error) => Exit::Errors,
        }
    }

    /// Returns the report as JSON.
    pub(super) fn json(&self) -> serde_json::Value {
        json!({
            "ok": self.results.findings.is_empty(),
            "release": env!("CARGO_PKG_VERSION"),
            "findings": self.results.findings,
            "ignored": self.ignored,
            "facts": self.results.facts,
            "measured": self.results.rates,
        })
    }

    fn count(&self, severity: Severity) -> usize {
        let of = self.results.findings.iter();
        of.filter(|finding| finding.severity == severity).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut area = "";
        for fact in &self.results.facts {
            let shown = if fact.area == area { "" } else { fact.area };
            writeln!(f, "{shown:<14} {}", fact.text)?;
            area = fact.area;
        }
        for rate in &self.results.rates {
            let mut line = format!(
                "{:<14} {} from {}: {:.2} GB/s (at least {:.1} are usual)",
                "measured", rate.transport, rate.memory, rate.gb_per_s, rate.at_least_gb_per_s
            );
            if !rate.route.is_empty() {
                write!(line, ", UCX took {}", rate.route)?;
            }
            writeln!(f, "{line}")?;
        }
        writeln!(f)?;
        for finding in &self.results.findings {
            writeln!(f, "{}: {}", finding.severity.as_str(), finding.code)?;
            writeln!(f, "  seen  {}", finding.seen.replace('\n', "\n        "))?;
            writeln!(f, "  why   {}", finding.why)?;
            writeln!(f, "  cure  {}", finding.cure)?;
        }
        let (errors, warnings) = (self.count(Severity::Error), self.count(Severity::Warning));
        match (errors, warnings) {
            (0, 0) => write!(f, "nothing found")?,
            _ => write!(
                f,
                "{errors} errors, {warnings} warnings; docs/doctor.md explains each code"
            )?,
        }
        if self.ignored > 0 {
            write!(f, " ({} ignored)", self.ignored)?;
        }
        writeln!(f)
    }
}
