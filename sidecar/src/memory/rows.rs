//! Describes many small pieces at equal distances.

/// Pieces of a buffer: the first begins at `offset`, and each further piece begins `step` bytes after the
/// start of the piece before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Offset of the first byte of the first piece.
    pub(crate) offset: u64,
    /// Bytes from the start of one piece to the start of the next; not less than `width`.
    pub(crate) step: u64,
    /// Bytes of a piece.
    pub(crate) width: usize,
}
