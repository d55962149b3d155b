//! Tests that docs/proxy and docs/reference list exactly the flags, metrics, reasons and codes that the proxy
//! has.

use std::collections::BTreeSet;

use clap::CommandFactory;
use proxy::{Code, Config, Fallback, Metrics, Outcome, PASSED_ON};

const OVERVIEW: &str = include_str!("../../../docs/proxy/overview.md");
const FLAGS: &str = include_str!("../../../docs/proxy/flags.md");
const METRICS: &str = include_str!("../../../docs/proxy/metrics.md");
const REASONS: &str = include_str!("../../../docs/reference/reasons.md");

/// Returns the first cells of the table rows below a heading of a page, without their backticks.
fn documented(page: &str, heading: &str) -> BTreeSet<String> {
    let (_, section) = page
        .split_once(&format!("\n{heading}\n"))
        .unwrap_or_else(|| panic!("no {heading:?}"));
    let section = section.split("\n#").next().unwrap();
    section
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name.to_owned())
        .collect()
}

fn set<T: ToString>(names: impl IntoIterator<Item = T>) -> BTreeSet<String> {
    names.into_iter().map(|name| name.to_string()).collect()
}

#[test]
fn metrics() {
    let text = Metrics::new().text(&[], &[]);
    let mut families = BTreeSet::new();
    for line in text.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, kind) = family.split_once(' ').unwrap();
            families.insert(match kind {
                "counter" => format!("{name}_total"),
                "info" => format!("{name}_info"),
                _ => name.to_owned(),
            });
        }
    }
    assert_eq!(documented(METRICS, "## Metrics"), families);
}

#[test]
fn flags() {
    let command = Config::command();
    let flags = command
        .get_arguments()
        .filter_map(|argument| argument.get_long())
        .filter(|name| !matches!(*name, "help" | "version"))
        .map(|name| format!("--{name}"));
    assert_eq!(documented(FLAGS, "## Flags"), set(flags));
    for argument in command.get_arguments() {
        let Some(name) = argument.get_long() else {
            continue;
        };
        // Demos of other projects use these variables for `--prefill` and `--decode`.
        let wanted = match name {
            "prefill" => Some("PREFILL_ENDPOINTS".to_owned()),
            "decode" => Some("DECODE_ENDPOINTS".to_owned()),
            "host" | "port" | "proxy-host" | "proxy-port" => None,
            _ => Some(format!(
                "PD_PROXY_{}",
                name.to_uppercase().replace('-', "_")
            )),
        };
        let variable = argument.get_env().and_then(|variable| variable.to_str());
        assert_eq!(variable, wanted.as_deref());
        for default in argument.get_default_values() {
            let row = format!("| `--{name}` | `{}` |", default.to_str().unwrap());
            let switch = default == "false";
            assert!(switch || FLAGS.contains(&row), "no row begins with {row}");
        }
    }
}

#[test]
fn reasons() {
    let heading = "## Reasons of the proxy";
    assert_eq!(documented(REASONS, heading), set(Fallback::ALL));
}

#[test]
fn endpoints_that_are_passed_on() {
    let mut shown = documented(OVERVIEW, "### Endpoints that are passed on");
    for passed in &PASSED_ON {
        let row = format!("| `{}` | {} |", passed.path, passed.methods.as_str());
        assert!(OVERVIEW.contains(&row), "no row begins with {row}");
        shown.remove(passed.path);
    }
    assert!(shown.is_empty(), "the proxy does not pass on {shown:?}");
}

#[test]
fn codes() {
    let row = |code: &Code| format!("| `{}` | {} |", code.as_str(), code.status().as_u16());
    for code in Code::ALL {
        assert!(OVERVIEW.contains(&row(code)), "no {}", row(code));
    }
}

#[test]
fn outcomes() {
    assert_eq!(documented(METRICS, "### Outcomes"), set(Outcome::ALL));
}
