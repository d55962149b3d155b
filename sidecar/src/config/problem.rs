//! One mistake of a configuration, and one line of a report.

use std::fmt;

/// One mistake of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// The place: a flag, a variable or a line of the file; empty if a key is missing.
    pub(crate) place: String,
    /// The key with its section, such as `sidecar.id`; empty if the file as a whole is wrong.
    pub(crate) key: String,
    /// The value as given; empty if there is none.
    pub(crate) value: String,
    /// The mistake, in a few words.
    pub(crate) what: String,
    /// The way to correct the mistake; empty if there is no hint.
    pub(crate) right: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        if !self.key.is_empty() {
            f.write_str(&self.key)?;
            if !self.value.is_empty() {
                write!(f, " = {:?}", self.value)?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.what)?;
        if !self.right.is_empty() {
            write!(f, "; {}", self.right)?;
        }
        Ok(())
    }
}

/// A line of a report: a key, its value, its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// The key with its section, such as `sidecar.id`.
    pub(crate) key: String,
    /// The value in the spelling that reports show; `-` for none.
    pub(crate) value: String,
    /// The source of the value; empty for none.
    pub(crate) source: String,
}
