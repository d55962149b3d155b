//! The mistakes and warnings that `sidecar check-config` finds.

use super::finding::{Results, kinds};
use super::subject::Subject;

kinds! {
    WRONG = Error "config-wrong":
        "the sidecar ends with exit code 64 at its start";
        "correct the value; docs/reference/configuration.md explains every key";
    KEY_FILE = Error "key-file":
        "without its key this process can prove nothing to its peers, and does not start";
        "make a key with `sidecar keygen FILE`, owned by the user of the sidecar, with mode 0600 (docs/keys.md)";
    ROSTER = Error "roster":
        "a roster with a mistake lists nobody, and the sidecar does not start";
        "correct the entry that is named, and copy the same roster to all hosts (docs/keys.md)";
    DOUBTFUL = Warning "config-doubtful":
        "the sidecar starts, but not with the effect that the setting suggests";
        "change or remove the setting that is named";
    UNKNOWN_KEY = Warning "config-unknown-key":
        "the sidecar ignores keys that it does not know";
        "correct the spelling, or remove the key";
}

/// Reports each mistake and each warning of the configuration.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let Some(report) = subject.report else {
        results.fact("configuration", "none: only the host is examined");
        return;
    };
    for problem in &report.problems {
        let kind = match problem.key.as_str() {
            "sidecar.key_file" => &KEY_FILE,
            "sidecar.roster" => &ROSTER,
            _ => &WRONG,
        };
        results.add(kind, problem.to_string());
    }
    for warning in &report.warnings {
        results.add(&DOUBTFUL, warning.clone());
    }
    for key in &report.unknown {
        results.add(
            &UNKNOWN_KEY,
            format!("{key} is not a key of LMCache or of the sidecar"),
        );
    }
    if let Some(config) = subject.config {
        let text = format!(
            "{} {}, {} ranks, transport {}",
            config.role, config.id, config.ranks, config.transport
        );
        results.fact("configuration", text);
    }
}
