//! Reads the agent's name from the metadata of a NIXL agent.

use crate::serdes::Fields;

/// Returns the name of the agent that a metadata blob describes.
///
/// LMCache's init answer contains the requester's own name, which LMCache's receiver gets from
/// NIXL. This function reads the name without NIXL. Returns `None` if the blob is not from a NIXL
/// 1.x agent or if the name is longer than [`MAX_NAME_BYTES`].
pub fn agent_name(metadata: &[u8]) -> Option<&[u8]> {
    let name = Fields::read(metadata)?.take("Agent")?;
    (!name.is_empty() && name.len() <= MAX_NAME_BYTES).then_some(name)
}

/// Maximum length of an agent's name in bytes. LMCache's names are UUIDs of 36 bytes.
pub const MAX_NAME_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_name_of_a_real_agent() {
        let blob = include_bytes!("../fixtures/metadata_sender.bin");
        assert_eq!(agent_name(blob), Some(&b"sender-1111"[..]));
        assert_eq!(agent_name(&blob[..40]), Some(&b"sender-1111"[..]));
        for len in 0..36 {
            assert_eq!(agent_name(&blob[..len]), None, "cut to {len}");
        }
    }

    #[test]
    fn refuses_everything_else() {
        let blob = |len: u64, name: &[u8]| {
            [b"nixlSerDes|Agent", &len.to_le_bytes()[..], name, b"|"].concat()
        };
        let check = |blob: Vec<u8>, expected: Option<&[u8]>| {
            assert_eq!(agent_name(&blob), expected);
        };
        check(blob(1, b"a"), Some(b"a"));
        check(blob(0, b""), None);
        check(blob(2, b"a"), None);
        check(blob(u64::MAX, b"a"), None);
        check(blob(257, &[b'a'; 257]), None);
        check(b"\x01\x02".to_vec(), None);
        check(Vec::new(), None);
    }
}
