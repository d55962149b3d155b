//! The little that must be known of NIXL's metadata blobs before loading them.
//!
//! The library tells the name in a blob only after it has loaded it, and then the peer that had the
//! name before is gone: whether that one is healthy, failed or busy decides whether to load at all.

/// The agent name in a metadata blob, or `None` if it is not one.
///
/// The blob is `nixlSerDes|` and then fields of `tag`, little-endian u64 length, data, `|`; the first
/// has the tag `Agent`. What follows is not looked at.
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

/// Longest agent name that is taken for one. Ours and LMCache's are UUIDs of 36 bytes.
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
        // Truncated, or without the end mark where the length says it is.
        check(&blob(36, name, b""), None);
        check(&blob(35, name, b"|"), None);
        check(&blob(37, name, b"|"), None);
        // Lengths that no name has.
        check(&blob(0, b"", b"|"), None);
        check(&blob(u64::MAX, name, b"|"), None);
        check(&blob(257, &[b'x'; 257], b"|"), None);
        check(&blob(256, &[b'x'; 256], b"|"), Some(&[b'x'; 256]));
        // Not metadata.
        check(b"", None);
        check(b"nixlSerDes|", None);
        check(b"nixlSerDes|Conns", None);
    }
}
