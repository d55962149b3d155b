//! Makes the tables of docs/reference/configuration.md from the tables of keys.

use std::fmt::Write;

use super::key::{Default, Key, Section};
use super::keys::{Lmcache, Sidecar};
use super::lmcache::{GROUPS, REFUSALS};

/// Returns Markdown tables of all keys: LMCache's keys, the sidecar's own keys, the ignored keys and
/// the refused keys.
pub(crate) fn reference() -> String {
    let mut text = String::new();
    keys(&mut text, "Keys shared with LMCache", Lmcache::KEYS);
    keys(&mut text, "Keys below `sidecar:`", Sidecar::KEYS);
    line(&mut text, "\n## LMCache's keys that are ignored\n");
    line(&mut text, "| keys | because |");
    line(&mut text, "|---|---|");
    for group in GROUPS {
        let keys: Vec<_> = group.keys.iter().map(|k| format!("`{k}`")).collect();
        line(
            &mut text,
            &format!("| {} | {} |", keys.join(" "), group.why),
        );
    }
    line(&mut text, "\n## LMCache's keys that are refused\n");
    line(&mut text, "| key | unless | because | instead |");
    line(&mut text, "|---|---|---|---|");
    for refusal in REFUSALS {
        let unless = match refusal.harmless {
            [] => "never accepted".to_owned(),
            values => values.join(", "),
        };
        let (key, why, instead) = (refusal.key, refusal.why, refusal.instead);
        line(
            &mut text,
            &format!("| `{key}` | {unless} | {why} | {instead} |"),
        );
    }
    text
}

/// Returns every flag that overrides a key.
#[cfg(test)]
pub(crate) fn flags() -> Vec<&'static str> {
    let keys = Lmcache::KEYS.iter().chain(Sidecar::KEYS);
    keys.map(|k| k.flag).filter(|f| !f.is_empty()).collect()
}

fn keys(text: &mut String, title: &str, keys: &[Key]) {
    line(text, &format!("\n## {title}\n"));
    line(text, "| key | default | flag | what it does |");
    line(text, "|---|---|---|---|");
    for key in keys {
        let default = match key.default {
            Default::None => "none".to_owned(),
            Default::Required(when) => format!("required {when}"),
            Default::Value(value) => format!("`{value}`"),
            Default::Computed(how) => how.to_owned(),
        };
        let flag = match key.flag {
            "" => String::new(),
            flag => format!("`{flag}`"),
        };
        let mut doc = key.doc.trim().to_owned();
        if !key.aliases.is_empty() {
            let names: Vec<_> = key.aliases.iter().map(|a| format!("`{a}`")).collect();
            write!(doc, " Also {}.", names.join(", ")).expect("a String takes every write");
        }
        write!(doc, " Takes {}.", key.want.replace('|', "\\|"))
            .expect("a String takes every write");
        let path = match key.section {
            Section::Lmcache => key.name.to_owned(),
            Section::Sidecar => key.path(),
        };
        line(text, &format!("| `{path}` | {default} | {flag} | {doc} |"));
    }
}

fn line(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}
