//! The form of a value in a remote store.
//!
//! `magic[8], checksum[16], key length u16, 0 u16, seven numbers i32, deadline u64, body length u64, key, body`; all
//! numbers are little-endian. The checksum (XXH3, 128 bits) covers everything behind it. The key is in the value, so a
//! value that another key's name leads to is never served.

use bytes::{BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::entry::{About, Entry, Key};

/// A value that is not what was put under the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Damage {
    /// The value is shorter or longer than its head says, or has no head.
    #[error("the value is torn, or was not written by a store of this form")]
    Torn,
    /// The checksum is wrong.
    #[error("the checksum of the value is wrong")]
    Checksum,
    /// The value belongs to another key.
    #[error("the value belongs to another key")]
    Key,
}

/// Returns the name of a key in a remote store. Two keys with the same name replace each other, and each then misses.
pub(super) fn name(prefix: &str, key: &Key) -> String {
    let digest = format!("{:032x}", xxh3_128(key));
    // Object stores spread their load by the beginning of a name.
    format!("{prefix}/{}/{digest}", &digest[..2])
}

/// Returns the bytes in front of the body.
pub(super) fn head(key: &Key, entry: &Entry) -> Bytes {
    let mut rest = BytesMut::with_capacity(HEAD_BYTES + key.len());
    let key_length = u16::try_from(key.len()).expect("a key on the wire has at most 150 bytes");
    rest.put_u16_le(key_length);
    rest.put_u16_le(0);
    for number in entry.about.numbers() {
        rest.put_i32_le(number);
    }
    rest.put_u64_le(entry.deadline_ms);
    rest.put_u64_le(entry.body.len() as u64);
    rest.put_slice(key);
    let mut sum = Xxh3::new();
    sum.update(&rest);
    sum.update(&entry.body);
    let mut head = BytesMut::with_capacity(HEAD_BYTES + key.len());
    head.put_slice(MAGIC);
    head.put_u128_le(sum.digest128());
    head.put_slice(&rest);
    head.freeze()
}

/// Reads a value and checks that it is complete, unchanged, and the key's own. The body shares the bytes.
///
/// # Errors
/// See [`Damage`].
pub(super) fn open(value: &Bytes, key: &Key) -> Result<Entry, Damage> {
    if value.len() < HEAD_BYTES || &value[..8] != MAGIC {
        return Err(Damage::Torn);
    }
    let mut numbers = [0; 7];
    for (number, bytes) in numbers.iter_mut().zip(value[28..56].chunks_exact(4)) {
        *number = i32::from_le_bytes(array(bytes));
    }
    let key_length = usize::from(u16::from_le_bytes(array(&value[24..26])));
    let deadline_ms = u64::from_le_bytes(array(&value[56..64]));
    let length = u64::from_le_bytes(array(&value[64..72]));
    let begin = HEAD_BYTES + key_length;
    if value.len() < begin || (value.len() - begin) as u64 != length {
        return Err(Damage::Torn);
    }
    if xxh3_128(&value[24..]) != u128::from_le_bytes(array(&value[8..24])) {
        return Err(Damage::Checksum);
    }
    if &value[HEAD_BYTES..begin] != key.as_slice() {
        return Err(Damage::Key);
    }
    Ok(Entry {
        about: About::from_numbers(numbers),
        deadline_ms,
        body: value.slice(begin..),
    })
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the caller cuts the bytes")
}

/// The first bytes of a value. A change of the form needs another number.
const MAGIC: &[u8; 8] = b"pd-kv-1\n";
/// Bytes in front of the key.
const HEAD_BYTES: usize = 8 + 16 + 2 + 2 + 7 * 4 + 8 + 8;
/// Bytes of a value in a remote store besides its body, at most.
pub(super) const MOST_HEAD_BYTES: usize = HEAD_BYTES + 150;

#[cfg(test)]
mod tests {
    use super::*;

    fn value(key: &Key) -> (Entry, Bytes) {
        let about = About {
            format: 5,
            dtype: -7,
            location: 2,
            shape: [2, 32, 256, 0],
        };
        let entry = Entry {
            about,
            deadline_ms: 77,
            body: Bytes::from_static(b"some kv"),
        };
        let value = [head(key, &entry), entry.body.clone()].concat();
        (entry, value.into())
    }

    #[test]
    fn a_value_comes_back() {
        let key = b"m@1@0@ab@half".to_vec();
        let (entry, value) = value(&key);
        assert_eq!(open(&value, &key), Ok(entry));
    }

    #[test]
    fn no_changed_byte_and_no_missing_byte_is_overlooked() {
        let key = b"key".to_vec();
        let (_, value) = value(&key);
        for at in 0..value.len() {
            let mut changed = value.to_vec();
            changed[at] ^= 0x20;
            assert!(open(&changed.into(), &key).is_err(), "byte {at}");
            assert!(open(&value.slice(..at), &key).is_err(), "{at} bytes");
        }
        let longer = [&value[..], b"x"].concat();
        assert_eq!(open(&longer.into(), &key), Err(Damage::Torn));
        assert_eq!(open(&value, &b"kez".to_vec()), Err(Damage::Key));
    }

    #[test]
    fn names_differ_and_have_the_prefix() {
        let of = |key: &[u8]| name("kv", &key.to_vec());
        assert_ne!(of(b"a"), of(b"b"));
        let one = of(b"a");
        assert!(one.starts_with("kv/") && one.len() == 3 + 3 + 32, "{one}");
    }
}
