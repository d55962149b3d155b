//! The types of configuration values. Each type reads every accepted spelling, and names the accepted values
//! for messages.

mod address;
mod device;
mod number;
mod time;
mod word;

use std::fmt;

pub(crate) use self::address::{Host, HostPort, Url, is_wildcard};
pub(crate) use self::device::{Device, Devices};
pub(crate) use self::number::{Bytes, Count, MAX_RANKS, Port, Ports};
pub(crate) use self::time::{Millis, Seconds};
pub(crate) use self::word::{LogFormat, NixlOverTcp, Role};

use super::yaml::Raw;

/// A type of value.
pub(crate) trait Value: Sized + Clone + fmt::Debug {
    /// The accepted values, in the words that follow "write" in an error message.
    const WANT: &'static str;

    /// Reads a value. If the spelling is accepted but deserves a warning, adds the warning to `notes`.
    ///
    /// # Errors
    /// The mistake, in a few words.
    fn read(raw: &Raw, notes: &mut Vec<String>) -> Result<Self, String>;

    /// Returns the spelling that reports show.
    fn show(&self) -> String;
}

/// `true` or `false`.
impl Value for bool {
    const WANT: &'static str = "true or false";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        match scalar(raw)?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "y" | "1" => Ok(true),
            "false" | "no" | "off" | "n" | "0" => Ok(false),
            _ => Err("neither true nor false".to_owned()),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// Any text that is not empty.
impl Value for String {
    const WANT: &'static str = "a text";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        match scalar(raw)?.trim() {
            "" => Err("empty".to_owned()),
            text => Ok(text.to_owned()),
        }
    }

    fn show(&self) -> String {
        self.clone()
    }
}

/// A list of words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Words(pub(crate) Vec<String>);

impl Value for Words {
    const WANT: &'static str = "a list of names: [UCX]";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        let words: Result<Vec<_>, _> = items(raw)?
            .iter()
            .map(|item| scalar(item).map(|s| s.trim().to_owned()))
            .collect();
        match words? {
            words if words.iter().any(String::is_empty) => Err("an empty name".to_owned()),
            words => Ok(Self(words)),
        }
    }

    fn show(&self) -> String {
        format!("[{}]", self.0.join(", "))
    }
}

/// Any value, kept as text, for keys that are ignored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Any(pub(crate) String);

impl Value for Any {
    const WANT: &'static str = "anything";

    fn read(raw: &Raw, _: &mut Vec<String>) -> Result<Self, String> {
        Ok(Self(raw.show()))
    }

    fn show(&self) -> String {
        self.0.clone()
    }
}

fn scalar(raw: &Raw) -> Result<&str, String> {
    match raw {
        Raw::Scalar { text, .. } => Ok(text),
        Raw::List(_) => Err("a list".to_owned()),
        Raw::Map(_) => Err("a mapping".to_owned()),
        Raw::Null => Err("nothing".to_owned()),
    }
}

/// Returns the items of a list. A scalar is split at its commas, because an environment variable can hold a
/// list only in this form.
fn items(raw: &Raw) -> Result<Vec<Raw>, String> {
    match raw {
        Raw::List(nodes) => Ok(nodes.iter().map(|n| n.raw.clone()).collect()),
        Raw::Scalar { text, plain } => Ok(text
            .trim()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .split(',')
            .map(|part| Raw::Scalar {
                text: part.trim().to_owned(),
                plain: *plain,
            })
            .collect()),
        Raw::Map(_) => Err("a mapping".to_owned()),
        Raw::Null => Err("nothing".to_owned()),
    }
}

#[cfg(test)]
mod tests;
