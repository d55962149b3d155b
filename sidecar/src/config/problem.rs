//! One thing that is wrong, and one line of a report.

use std::fmt;

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Where: a flag, a variable, a file's line; empty if something is missing.
    pub(crate) place: String,
    /// The key, from the top of the file; empty if the file as a whole is wrong.
    pub(crate) key: String,
    /// The value as given; empty if there is none.
    pub(crate) value: String,
    /// What is wrong.
    pub(crate) what: String,
    /// What would be right.
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
    /// The key, from the top of the file.
    pub(crate) key: String,
    /// The value in its one spelling; `-` for none.
    pub(crate) value: String,
    /// Where it came from.
    pub(crate) source: String,
}
