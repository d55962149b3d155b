//! Reads the agent name in NIXL's metadata blobs before the library loads them.
//!
//! The library returns the name only after it has loaded the blob, and the load replaces an earlier
//! peer with the same name. This crate must know the name before the load, because it must not
//! replace a peer that is healthy or busy.

/// Returns the agent name in a metadata blob, or `None` if the blob is not metadata.
///
/// A blob is `nixlSerDes|`, followed by fields. Each field is a tag, a little-endian u64 length,
/// the data and `|`. The first field has the tag `Agent`. This function does not look at the other
/// fields.
pub(crate) fn agent_name(blob: &[u8]) -> Option<&[u8]> {
    let field = blob.strip_prefix(b"nixlSerDes|Agent")?;
    let (length, rest) = field.split_first_chunk()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    if length == 0 || length > MAX_NAME {
        return None;
    }
    let name = rest.get(..length)?;
    (rest.get(length) == Some(&b'|')).then_some(name)
}

/// Maximum length of an agent name in bytes. The names of sidecars and of LMCache are UUIDs of 36 bytes.
const MAX_NAME: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(length: u64, name: &[u8], rest: &[u8]) -> Vec<u8> {
        let mut blob = b"nixlSerDes|Agent".to_vec();
        blob.extend(length.to_le_bytes());
        blob.extend(name);
        blob.extend(rest);
        blob
    }

    #[test]
    fn names() {
        let check = |blob: &[u8], expect: Option<&[u8]>| assert_eq!(agent_name(blob), expect);
        let name = b"1c9f0a8e-7d52-4a64-9a0b-2f6c1a7d3e55";
        check(&blob(36, name, b"|Conns"), Some(name));
        check(&blob(3, b"a|b", b"|"), Some(b"a|b"));
        // In these blobs no `|` follows the name, because the blob is truncated or its length field is
        // wrong.
        check(&blob(36, name, b""), None);
        check(&blob(35, name, b"|"), None);
        check(&blob(37, name, b"|"), None);
        // These lengths are not possible for a name.
        check(&blob(0, b"", b"|"), None);
        check(&blob(u64::MAX, name, b"|"), None);
        check(&blob(257, &[b'x'; 257], b"|"), None);
        check(&blob(256, &[b'x'; 256], b"|"), Some(&[b'x'; 256]));
        // These blobs are not metadata.
        check(b"", None);
        check(b"nixlSerDes|", None);
        check(b"nixlSerDes|Conns", None);
    }
}
