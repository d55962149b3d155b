//! Cuts the parts of a protected write into pieces. Each piece has one tag.

use super::seal::TAG_BYTES;
use crate::memory::PIECE_BYTES;

/// The part of a frame's body that is still to come: bytes and tags.
#[derive(Debug)]
pub(super) struct Rest {
    pub(super) bytes: u64,
    pub(super) tags: u64,
}

impl Rest {
    pub(super) fn total(&self) -> u64 {
        self.bytes + self.tags * TAG_BYTES as u64
    }
}

/// Returns the bytes of the next piece of a part.
pub(super) fn piece(left: u64) -> usize {
    usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES))
}

/// Returns the number of pieces of a part, each of which has a tag.
pub(super) fn pieces(bytes: u64) -> u64 {
    bytes.div_ceil(PIECE_BYTES as u64)
}
