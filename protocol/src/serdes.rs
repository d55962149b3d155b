//! Reads and writes NIXL's own serialisation, as far as this crate needs it.
//!
//! The format is `"nixlSerDes|"`, then fields: tag, `u64` length, bytes, `|`. There is no separator
//! between a tag and its length, so a reader must know the next tag in advance.

/// Serialised fields, for reading or for writing.
pub(crate) struct Fields<B>(B);

impl<'a> Fields<&'a [u8]> {
    /// Starts reading; returns `None` if the magic bytes are missing.
    pub(crate) fn read(bytes: &'a [u8]) -> Option<Self> {
        bytes.strip_prefix(MAGIC).map(Self)
    }

    /// Returns the bytes of the next field; `None` if the field has another tag or is truncated.
    pub(crate) fn take(&mut self, tag: &str) -> Option<&'a [u8]> {
        let rest = self.0.strip_prefix(tag.as_bytes())?;
        let (len, rest) = rest.split_first_chunk::<8>()?;
        let (data, rest) =
            rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
        self.0 = rest.strip_prefix(b"|")?;
        Some(data)
    }

    /// Returns true if no field is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Fields<Vec<u8>> {
    /// Starts writing, with memory for `capacity` bytes.
    pub(crate) fn begin(capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity);
        bytes.extend_from_slice(MAGIC);
        Self(bytes)
    }

    /// Appends a field.
    pub(crate) fn put(&mut self, tag: &str, data: &[u8]) {
        self.0.extend_from_slice(tag.as_bytes());
        self.0.extend_from_slice(&(data.len() as u64).to_le_bytes());
        self.0.extend_from_slice(data);
        self.0.push(b'|');
    }

    /// Returns the serialised bytes.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}

const MAGIC: &[u8] = b"nixlSerDes|";
