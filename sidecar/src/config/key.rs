//! One key of the configuration: its name, section and default.

/// Where a key stands in the file, and how its environment variable begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Section {
    /// At the top level; LMCache reads it too.
    Lmcache,
    /// Below `sidecar:`; LMCache ignores it.
    Sidecar,
}

/// What holds when nobody says anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Default {
    /// Nothing.
    None,
    /// It must be given; by whom.
    Required(&'static str),
    /// This value.
    Value(&'static str),
    /// What follows from other keys.
    Computed(&'static str),
}

/// One key.
#[derive(Debug)]
pub(crate) struct Key {
    /// Its name within its section.
    pub(crate) name: &'static str,
    /// Its section.
    pub(crate) section: Section,
    /// Other names that mean the same.
    pub(crate) aliases: &'static [&'static str],
    /// The flag that overrides it, with its dashes; empty if there is none.
    pub(crate) flag: &'static str,
    /// What holds otherwise.
    pub(crate) default: Default,
    /// What would be right.
    pub(crate) want: &'static str,
    /// What it does.
    pub(crate) doc: &'static str,
}

impl Key {
    /// The name from the top of the file.
    pub(crate) fn path(&self) -> String {
        self.section.path(self.name)
    }

    /// The environment variable.
    pub(crate) fn variable(&self) -> String {
        self.section.variable(self.name)
    }
}

impl Section {
    /// The name of `name` from the top of the file.
    pub(crate) fn path(self, name: &str) -> String {
        match self {
            Self::Lmcache => name.to_owned(),
            Self::Sidecar => format!("sidecar.{name}"),
        }
    }

    /// The environment variable of `name`.
    pub(crate) fn variable(self, name: &str) -> String {
        let prefix = match self {
            Self::Lmcache => LMCACHE_PREFIX,
            Self::Sidecar => SIDECAR_PREFIX,
        };
        format!("{prefix}{}", name.to_ascii_uppercase())
    }
}

/// Begins LMCache's variables.
pub(crate) const LMCACHE_PREFIX: &str = "LMCACHE_";
/// Begins ours.
pub(crate) const SIDECAR_PREFIX: &str = "PD_SIDECAR_";
