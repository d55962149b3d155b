//! One key of the configuration: its name, section and default.

/// The section of the file to which a key belongs. The section also decides the prefix of the key's
/// environment variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Section {
    /// The top level of the file. LMCache reads these keys, too.
    Lmcache,
    /// The section below `sidecar:`. LMCache ignores these keys.
    Sidecar,
}

/// The value of a key that is not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Default {
    /// There is no value.
    None,
    /// The key must be given. The text says in which case the key must be given.
    Required(&'static str),
    /// The value is this text.
    Value(&'static str),
    /// The value follows from other keys. The text describes how.
    Computed(&'static str),
}

/// A key of the configuration.
#[derive(Debug)]
pub(crate) struct Key {
    /// Name within the section.
    pub(crate) name: &'static str,
    /// Section of the file.
    pub(crate) section: Section,
    /// Other accepted names of the key.
    pub(crate) aliases: &'static [&'static str],
    /// The flag that overrides the key, with its dashes; empty if there is none.
    pub(crate) flag: &'static str,
    /// The value if the key is not given.
    pub(crate) default: Default,
    /// The accepted values, for messages.
    pub(crate) want: &'static str,
    /// The description for docs/reference/configuration.md.
    pub(crate) doc: &'static str,
}

impl Key {
    /// Returns the key's name with its section, such as `sidecar.id`.
    pub(crate) fn path(&self) -> String {
        self.section.path(self.name)
    }

    /// Returns the name of the environment variable.
    pub(crate) fn variable(&self) -> String {
        self.section.variable(self.name)
    }
}

impl Section {
    /// Returns the name of the key `name` with this section, such as `sidecar.id`.
    pub(crate) fn path(self, name: &str) -> String {
        match self {
            Self::Lmcache => name.to_owned(),
            Self::Sidecar => format!("sidecar.{name}"),
        }
    }

    /// Returns the environment variable of the key `name`.
    pub(crate) fn variable(self, name: &str) -> String {
        let prefix = match self {
            Self::Lmcache => LMCACHE_PREFIX,
            Self::Sidecar => SIDECAR_PREFIX,
        };
        format!("{prefix}{}", name.to_ascii_uppercase())
    }
}

/// Prefix of LMCache's variables.
pub(crate) const LMCACHE_PREFIX: &str = "LMCACHE_";
/// Prefix of the sidecar's own variables.
pub(crate) const SIDECAR_PREFIX: &str = "PD_SIDECAR_";
