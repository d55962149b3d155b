//! The places of many small pieces at equal distances.

/// Where the pieces stand: the first at `offset`, each further one `step` after the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    /// Of the first byte of the first piece.
    pub(crate) offset: u64,
    /// Not less than `width`.
    pub(crate) step: u64,
    /// Bytes of a piece.
    pub(crate) width: usize,
}
