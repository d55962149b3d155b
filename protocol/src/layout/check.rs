//! Faults of the groups of an engine's layout.

use super::Layout;
use crate::groups::Kind;

/// Error of [`Layout::check`]: the fault of a layout's groups.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// The layout has more than [`MAX_GROUPS`] groups.
    #[error("groups has {0} entries; at most {MAX_GROUPS} are allowed")]
    TooMany(usize),
    /// The layout has groups and no tokens in a chunk.
    #[error("chunk_tokens is 0")]
    NoTokens,
    /// The kind of a group is not known.
    #[error("groups[{index}].kind is {kind:?}, and not full, window, chunked or state")]
    Kind {
        /// Index of the group.
        index: usize,
        /// Beginning of the kind.
        kind: String,
    },
    /// A group has no bytes.
    #[error("groups[{0}].bytes is 0")]
    NoBytes(usize),
    /// A window or a chunk of local attention has no tokens.
    #[error("groups[{0}].size is 0, and a window or chunked group needs its number of tokens")]
    NoSize(usize),
    /// A chunk, or the state, has more than 2^64 bytes.
    #[error("groups[].bytes: the sum of all groups exceeds 2^64 bytes in a chunk of {0} tokens")]
    Overflow(u32),
    /// The state needs more than [`MAX_STATE_CHUNKS`] chunks.
    #[error(
        "groups[].bytes: the state has {state} bytes, and a chunk {chunk}: at most \
         {MAX_STATE_CHUNKS} chunks of state are allowed; set a larger chunk_size"
    )]
    LargeState {
        /// Bytes of all states.
        state: u64,
        /// Bytes of a slot.
        chunk: u64,
    },
}

impl Layout {
    /// Checks that a [`Chunking`](crate::plan::Chunking) can divide the groups of an engine's
    /// layout. A layout without groups has no fault.
    ///
    /// # Errors
    /// Returns the first fault, with the name of the field.
    pub fn check(&self) -> Result<(), GroupError> {
        if self.groups.is_empty() {
            return Ok(());
        }
        if self.groups.len() > MAX_GROUPS {
            return Err(GroupError::TooMany(self.groups.len()));
        }
        if self.chunk_tokens == 0 {
            return Err(GroupError::NoTokens);
        }
        for (index, group) in self.groups.iter().enumerate() {
            match group.kind() {
                Kind::Unknown => {
                    let kind = group.name();
                    return Err(GroupError::Kind { index, kind });
                }
                Kind::Window | Kind::Chunked if group.size == 0 => {
                    return Err(GroupError::NoSize(index));
                }
                _ if group.bytes == 0 => return Err(GroupError::NoBytes(index)),
                _ => {}
            }
        }
        let state = self.sum(|group| group.kind() == Kind::State);
        let (Some(chunk), Some(state)) = (self.chunk_bytes(), state) else {
            return Err(GroupError::Overflow(self.chunk_tokens));
        };
        if state.div_ceil(chunk) > u64::from(MAX_STATE_CHUNKS) {
            return Err(GroupError::LargeState { state, chunk });
        }
        Ok(())
    }
}

/// Maximum number of groups of a layout. Models have one to three kinds of layers, of few shapes
/// and dtypes.
pub const MAX_GROUPS: usize = 64;
/// Maximum number of chunks of one request's state. Each of these chunks has a key in the messages
/// of the request. A state of 72 MiB has 12 chunks of 6 MiB.
pub const MAX_STATE_CHUNKS: u32 = 4096;
