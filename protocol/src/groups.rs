//! Groups of layers: all layers of a group have the same rule for what moves.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One group of layers with the same rule for what moves.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Group {
    /// Rule: `full`, `window`, `chunked` or `state`.
    pub kind: String,
    /// Size of one token's KV in all layers of the group and this rank, in bytes. For `state`: size
    /// of one request's state.
    pub bytes: u64,
    /// Number of tokens of the window, or of one chunk of chunked local attention. Absent: 0, for
    /// `full` and `state`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub size: u32,
}

/// Parsed [`Group::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All tokens.
    Full,
    /// The tokens of the sliding window that the next token reads.
    Window,
    /// The tokens of the next token's chunk of local attention.
    Chunked,
    /// The state after the last token, and no tokens.
    State,
    /// A kind of a newer release.
    Unknown,
}

impl Group {
    /// Returns the parsed kind.
    pub(crate) fn kind(&self) -> Kind {
        match self.kind.as_str() {
            "full" => Kind::Full,
            "window" => Kind::Window,
            "chunked" => Kind::Chunked,
            "state" => Kind::State,
            _ => Kind::Unknown,
        }
    }

    /// Returns the beginning of the kind, because a peer may send a long text.
    pub(crate) fn name(&self) -> String {
        self.kind.chars().take(16).collect()
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes", self.name(), self.bytes)?;
        if self.size > 0 {
            write!(f, " and size {}", self.size)?;
        }
        Ok(())
    }
}

/// Returns the texts of the first different groups of two lists; `None` if the lists are equal.
pub(crate) fn different(ours: &[Group], theirs: &[Group]) -> Option<(String, String)> {
    let count = |groups: &[Group]| match groups.len() {
        0 => "no groups".to_owned(),
        1 => "1 group".to_owned(),
        count => format!("{count} groups"),
    };
    if ours.len() != theirs.len() {
        return Some((count(ours), count(theirs)));
    }
    let mut pairs = (0..).zip(ours.iter().zip(theirs));
    let (index, (ours, theirs)) = pairs.find(|(_, (ours, theirs))| ours != theirs)?;
    let named = |group: &Group| format!("{group} at position {index}");
    Some((named(ours), named(theirs)))
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(size: &u32) -> bool {
    *size == 0
}
