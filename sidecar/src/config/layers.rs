//! Finds each key's value and source. A flag takes precedence over the environment. The environment takes
//! precedence over the file, which takes precedence over the defaults.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};

use common::kubernetes;

use super::key::{Default, Key, LMCACHE_PREFIX, SIDECAR_PREFIX, Section};
use super::problem::{Problem, Row};
use super::suggest::suggest;
use super::value::Value;
use super::yaml::{self, Entry, Raw};

/// All inputs of a configuration. No other input is read.
#[derive(Clone, Debug, std::default::Default)]
pub(crate) struct Inputs {
    /// The given flags with their dashes, and their values.
    pub(crate) flags: Vec<(&'static str, String)>,
    /// Environment variables.
    pub(crate) env: Vec<(String, String)>,
    /// The file's path and text; absent without a file.
    pub(crate) file: Option<(PathBuf, String)>,
    /// Host name of this machine.
    pub(crate) hostname: String,
    /// Effective user of this process.
    pub(crate) uid: u32,
    /// Process id of this process.
    pub(crate) pid: u32,
}

/// The source of a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A flag.
    Flag(&'static str),
    /// An environment variable.
    Env(String),
    /// A line of the file.
    File(PathBuf, usize),
    /// The default, because the key was not given.
    Default,
    /// Another key, from which the value follows.
    Key(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "flag {flag}"),
            Self::Env(name) => write!(f, "environment {name}"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Default => f.write_str("default"),
            Self::Key(key) => write!(f, "from {key}"),
        }
    }
}

/// A value and its source.
#[derive(Clone, Debug)]
pub(crate) struct Sourced<T> {
    /// The value.
    pub(crate) value: T,
    /// The source of the value.
    pub(crate) source: Source,
}

/// The three layers of input, and the mistakes and warnings that were found while reading them.
#[derive(Debug)]
pub(crate) struct Layers {
    flags: Vec<(&'static str, String)>,
    env: Vec<(String, String)>,
    pub(super) path: PathBuf,
    pub(super) lmcache: Vec<Entry>,
    pub(super) sidecar: Vec<Entry>,
    /// All known names, with `true` for the sidecar's own section.
    known: BTreeSet<(bool, String)>,
    /// Every key with a value or a default, in order.
    pub(crate) rows: Vec<Row>,
    /// The mistakes that were found.
    pub(crate) problems: Vec<Problem>,
    /// Warnings for the user.
    pub(crate) warnings: Vec<String>,
}

impl Layers {
    /// Reads the file and the environment, and splits the file into its sections.
    pub(crate) fn new(inputs: &Inputs) -> Self {
        let mut layers = Self {
            flags: inputs.flags.clone(),
            env: Vec::new(),
            path: PathBuf::new(),
            lmcache: Vec::new(),
            sidecar: Vec::new(),
            known: BTreeSet::new(),
            rows: Vec::new(),
            problems: Vec::new(),
            warnings: Vec::new(),
        };
        for (name, value) in &inputs.env {
            if value.trim().is_empty() {
                continue;
            }
            let ours = name.starts_with(SIDECAR_PREFIX) || name.starts_with(LMCACHE_PREFIX);
            if ours && let Some(note) = kubernetes::note(name, value) {
                layers.warnings.push(note);
                continue;
            }
            layers.env.push((name.clone(), value.clone()));
        }
        if let Some((path, text)) = &inputs.file {
            layers.read_file(path, text);
        }
        layers
    }

    fn read_file(&mut self, path: &Path, text: &str) {
        self.path = path.to_owned();
        match yaml::parse(text) {
            Ok(entries) => self.lmcache = entries,
            Err(error) => self.problems.push(Problem {
                place: format!("{}:{}", path.display(), error.line),
                key: String::new(),
                value: String::new(),
                what: error.what,
                right: String::new(),
            }),
        }
        let Some(at) = self.lmcache.iter().position(|e| e.key == SECTION) else {
            return;
        };
        let ours = self.lmcache.remove(at);
        match ours.value.raw {
            Raw::Map(entries) => self.sidecar = entries,
            Raw::Null => {}
            other => self.problems.push(Problem {
                place: format!("{}:{}", path.display(), ours.line),
                key: SECTION.to_owned(),
                value: other.show(),
                what: "not a mapping".to_owned(),
                right: "write the keys below it, indented".to_owned(),
            }),
        }
    }

    /// Returns the value of a key, or its default; absent if the key has no value and no default, or if the
    /// value is wrong.
    pub(crate) fn take<T: Value>(&mut self, key: &'static Key) -> Option<Sourced<T>> {
        let found = self.find(key).or_else(|| match key.default {
            Default::Value(text) => Some((Source::Default, Raw::outside(text))),
            _ => None,
        });
        let taken = found.and_then(|(source, raw)| self.typed::<T>(key, source, &raw));
        self.rows.push(Row {
            key: key.path(),
            value: taken.as_ref().map_or("-".to_owned(), |t| t.value.show()),
            source: taken
                .as_ref()
                .map_or(String::new(), |t| t.source.to_string()),
        });
        taken
    }

    fn typed<T: Value>(&mut self, key: &Key, source: Source, raw: &Raw) -> Option<Sourced<T>> {
        let mut notes = Vec::new();
        match T::read(raw, &mut notes) {
            Ok(value) => {
                let place = format!("{source}: {}", key.path());
                self.warnings
                    .extend(notes.into_iter().map(|note| format!("{place}: {note}")));
                Some(Sourced { value, source })
            }
            Err(what) => {
                self.problems.push(Problem {
                    place: source.to_string(),
                    key: key.path(),
                    value: raw.show(),
                    what,
                    right: format!("write {}", T::WANT),
                });
                None
            }
        }
    }

    /// Returns the untyped value of a key, from the highest layer that has one; absent if the key was not
    /// given.
    pub(crate) fn find(&mut self, key: &Key) -> Option<(Source, Raw)> {
        let names: Vec<&str> = std::iter::once(key.name)
            .chain(key.aliases.iter().copied())
            .collect();
        let ours = key.section == Section::Sidecar;
        for name in &names {
            self.known.insert((ours, (*name).to_owned()));
        }
        let flag = self
            .flags
            .iter()
            .find(|(flag, _)| !key.flag.is_empty() && *flag == key.flag)
            .map(|(flag, value)| (Source::Flag(flag), Raw::outside(value)));
        flag.or_else(|| self.find_env(key, &names))
            .or_else(|| self.find_line(key, &names))
    }

    fn find_env(&self, key: &Key, names: &[&str]) -> Option<(Source, Raw)> {
        names.iter().find_map(|name| {
            let variable = key.section.variable(name);
            let (_, value) = self.env.iter().find(|(n, _)| *n == variable)?;
            Some((Source::Env(variable), Raw::outside(value)))
        })
    }

    fn find_line(&mut self, key: &Key, names: &[&str]) -> Option<(Source, Raw)> {
        let section = match key.section {
            Section::Lmcache => &self.lmcache,
            Section::Sidecar => &self.sidecar,
        };
        let given: Vec<Entry> = names
            .iter()
            .filter_map(|name| section.iter().find(|e| e.key == *name))
            .filter(|e| e.value.raw != Raw::Null)
            .cloned()
            .collect();
        let first = given.first()?;
        for other in &given[1..] {
            if other.value.raw.show() != first.value.raw.show() {
                self.problems.push(Problem {
                    place: format!("{}:{}", self.path.display(), other.line),
                    key: other.key.clone(),
                    value: other.value.raw.show(),
                    what: format!(
                        "another name of `{}`, which line {} sets to `{}`",
                        first.key,
                        first.line,
                        first.value.raw.show()
                    ),
                    right: "keep one of them".to_owned(),
                });
            }
        }
        if first.key == "nixl_buffer_device" {
            self.warnings.push(format!(
                "{}:{}: nixl_buffer_device: LMCache reads pd_buffer_device for PD; the sidecar reads this key as \
                 pd_buffer_device",
                self.path.display(),
                first.line
            ));
        }
        let source = Source::File(self.path.clone(), first.line);
        Some((source, first.value.raw.clone()))
    }

    /// Sets the value and the source that the report shows for a key whose default was computed.
    pub(crate) fn computed(&mut self, path: &str, value: String, source: &Source) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.key == path) {
            row.value = value;
            row.source = source.to_string();
        }
    }

    /// Adds a mistake in the value of a key.
    pub(crate) fn wrong<T: Value>(
        &mut self,
        path: &str,
        given: &Sourced<T>,
        what: impl Into<String>,
        right: impl Into<String>,
    ) {
        self.problems.push(Problem {
            place: given.source.to_string(),
            key: path.to_owned(),
            value: given.value.show(),
            what: what.into(),
            right: right.into(),
        });
    }

    /// Adds the mistake that a key is missing. Adds nothing if the key was given with a wrong value, because
    /// that mistake is reported already. Adds nothing if the file could not be read, because the key may be
    /// in the file.
    pub(crate) fn missing(&mut self, key: &Key, why: &str) {
        let path = key.path();
        if self.problems.iter().any(|p| p.key.is_empty()) {
            return;
        }
        if self
            .problems
            .iter()
            .any(|p| p.key == path || key.aliases.contains(&p.key.as_str()))
        {
            return;
        }
        let mut ways = vec![format!("set {path} to {}", key.want)];
        if !key.flag.is_empty() {
            ways.push(format!("give {}", key.flag));
        }
        ways.push(format!("set {}", key.variable()));
        self.problems.push(Problem {
            place: String::new(),
            key: path,
            value: String::new(),
            what: format!("missing{why}"),
            right: ways.join(", or "),
        });
    }

    /// Adds a mistake for each unknown name. The caller must have looked up every known key before this
    /// call. Returns LMCache's unknown keys, which a newer LMCache may know.
    pub(crate) fn unknown(&mut self) -> Vec<String> {
        let mut ignored = Vec::new();
        for (ours, entries) in [
            (false, std::mem::take(&mut self.lmcache)),
            (true, std::mem::take(&mut self.sidecar)),
        ] {
            for entry in entries {
                if self.known.contains(&(ours, entry.key.clone())) {
                    continue;
                }
                // If an unknown key is almost equal to a known key, the user probably misspelled the known
                // key. If the key were ignored, the sidecar would start with another value than the user
                // meant.
                let near = self.suggest(&entry.key);
                if near.is_none() && !ours {
                    ignored.push(entry.key);
                    continue;
                }
                let section = if ours {
                    Section::Sidecar
                } else {
                    Section::Lmcache
                };
                self.problems.push(Problem {
                    place: format!("{}:{}", self.path.display(), entry.line),
                    key: section.path(&entry.key),
                    value: entry.value.raw.show(),
                    what: "no such key".to_owned(),
                    right: near.map_or("see docs/reference/configuration.md".to_owned(), |near| {
                        format!("did you mean {near}?")
                    }),
                });
            }
        }
        self.unknown_variables();
        ignored
    }

    fn unknown_variables(&mut self) {
        let variables: HashSet<String> = self
            .known
            .iter()
            .map(|(ours, name)| section_of(*ours).variable(name))
            .collect();
        for (name, _) in &self.env {
            let ours = name.starts_with(SIDECAR_PREFIX) || name.starts_with(LMCACHE_PREFIX);
            let other = [FILE_VARIABLE, SPAWNED_VARIABLE, BINARY_VARIABLE].contains(&name.as_str())
                || OTHER_VARIABLES.contains(&name.as_str());
            if ours && !other && !variables.contains(name) {
                let near = suggest(name, variables.iter().map(String::as_str));
                let hint = near.map_or(String::new(), |n| format!("; did you mean {n}?"));
                self.warnings
                    .push(format!("environment {name}: no such key, ignored{hint}"));
            }
        }
    }

    fn suggest(&self, name: &str) -> Option<String> {
        let best = suggest(name, self.known.iter().map(|(_, known)| known.as_str()))?;
        let (ours, name) = self.known.iter().find(|(_, known)| known == best)?;
        Some(section_of(*ours).path(name))
    }
}

/// The environment variable with the file's path. The flag takes precedence.
pub(crate) const FILE_VARIABLE: &str = "LMCACHE_CONFIG_FILE";

/// The variable that an engine sets to 1 for the sidecar that it starts.
pub(crate) const SPAWNED_VARIABLE: &str = "PD_SIDECAR_SPAWNED";
/// The value of [`SPAWNED_VARIABLE`] if the engine has a new id at each start, so that no later engine uses this
/// sidecar's socket.
pub(crate) const SPAWNED_WITHOUT_SUCCESSOR: &str = "alone";
/// The variable with which a user tells an engine where the sidecar's program is.
const BINARY_VARIABLE: &str = "PD_SIDECAR_BINARY";

/// Variables of LMCache's processes that are not keys of LMCache's configuration.
const OTHER_VARIABLES: &[&str] = &[
    "LMCACHE_FORCE_SKIP_SAVE",
    "LMCACHE_LOG_FORMAT",
    "LMCACHE_LOG_LEVEL",
    "LMCACHE_TRACK_USAGE",
    "LMCACHE_USAGE_TRACK_INTERVAL",
    "LMCACHE_USAGE_TRACK_URL",
    "LMCACHE_USE_EXPERIMENTAL",
];

/// The key of the file that contains the sidecar's own keys.
const SECTION: &str = "sidecar";

fn section_of(ours: bool) -> Section {
    if ours {
        Section::Sidecar
    } else {
        Section::Lmcache
    }
}
