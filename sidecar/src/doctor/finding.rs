//! Findings, and everything else that the doctor reports.

use serde::Serialize;

/// The weight of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Severity {
    /// The sidecar does not start, or moves no KV.
    Error,
    /// The sidecar works, but slower than it could, or it may stop working.
    Warning,
}

impl Severity {
    /// Returns the word in reports and in docs/doctor.md.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
        }
    }
}

/// A kind of finding: everything about it that does not depend on the host.
#[derive(Debug)]
pub(super) struct Kind {
    /// The name in reports, in `--ignore` and in docs/doctor.md.
    pub(super) code: &'static str,
    /// The weight.
    pub(super) severity: Severity,
    /// The harm that the fault does.
    pub(super) why: &'static str,
    /// The cure.
    pub(super) cure: &'static str,
}

/// A fault that was found.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Finding {
    pub(super) code: &'static str,
    pub(super) severity: Severity,
    /// The observation, with names and values.
    pub(super) seen: String,
    pub(super) why: &'static str,
    pub(super) cure: String,
}

/// A property of the host that is no fault.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Fact {
    pub(super) area: &'static str,
    pub(super) text: String,
}

/// The measured rate of one wire.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Rate {
    pub(super) transport: String,
    /// The memory of the buffers.
    pub(super) memory: String,
    /// 10⁹ bytes per second.
    pub(super) gb_per_s: f64,
    /// The rate that even the slowest wire of this kind exceeds.
    pub(super) at_least_gb_per_s: f64,
    /// The transports that UCX took, as UCX's log names them; empty for other wires.
    pub(super) route: String,
}

/// Everything that the doctor has found.
#[derive(Debug, Default)]
pub(super) struct Results {
    pub(super) findings: Vec<Finding>,
    pub(super) facts: Vec<Fact>,
    pub(super) rates: Vec<Rate>,
}

impl Results {
    /// Adds a finding with the kind's own cure.
    pub(super) fn add(&mut self, kind: &'static Kind, seen: impl Into<String>) {
        self.add_with(kind, seen, kind.cure);
    }

    /// Adds a finding with a cure that fits this host better than the kind's cure.
    pub(super) fn add_with(
        &mut self,
        kind: &'static Kind,
        seen: impl Into<String>,
        cure: impl Into<String>,
    ) {
        self.findings.push(Finding {
            code: kind.code,
            severity: kind.severity,
            seen: seen.into(),
            why: kind.why,
            cure: cure.into(),
        });
    }

    /// Adds a measured rate. If it is below the usual one, also adds a finding of this kind: `moves` says what moves how
    /// much, and `cure` what to do.
    pub(super) fn rate(&mut self, slow: &'static Kind, moves: &str, cure: &str, rate: Rate) {
        let least = rate.at_least_gb_per_s;
        if rate.gb_per_s < least {
            let seen = format!("{moves}, and at least {least:.1} are usual");
            self.add_with(slow, seen, cure);
        }
        self.rates.push(rate);
    }

    /// Adds a property of the host.
    pub(super) fn fact(&mut self, area: &'static str, text: impl Into<String>) {
        let text = text.into();
        self.facts.push(Fact { area, text });
    }

    /// Returns the codes of the findings.
    #[cfg(test)]
    pub(super) fn codes(&self) -> Vec<&'static str> {
        self.findings.iter().map(|finding| finding.code).collect()
    }
}

/// Declares the kinds of findings of one area: a constant for each kind, and the list `KINDS`.
macro_rules! kinds {
    ($($name:ident = $severity:ident $code:literal: $why:literal; $cure:literal;)+) => {
        $(static $name: $crate::doctor::finding::Kind = $crate::doctor::finding::Kind {
            code: $code,
            severity: $crate::doctor::finding::Severity::$severity,
            why: $why,
            cure: $cure,
        };)+

        /// The findings of this area.
        pub(super) static KINDS: &[&$crate::doctor::finding::Kind] = &[$(&$name),+];
    };
}
pub(super) use kinds;
