//! A value of the store, and its form on disk.

use std::io::{Read, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use foyer::{Code, Error, ErrorKind, Result};

/// The name of a value: the bytes of LMCache's key text.
pub type Key = Vec<u8>;

/// The description that a client sent with a value. The store returns these numbers unchanged and does not interpret
/// them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct About {
    /// LMCache's number of the memory format.
    pub format: i32,
    /// LMCache's number of the element type.
    pub dtype: i32,
    /// LMCache's number of the backend that had the value.
    pub location: i32,
    /// Shape in elements, with trailing zeros.
    pub shape: [i32; 4],
}

impl About {
    /// Returns the numbers in the order in which a value on disk and in a remote store has them.
    pub fn numbers(&self) -> [i32; 7] {
        let [a, b, c, d] = self.shape;
        [self.format, self.dtype, self.location, a, b, c, d]
    }

    /// Makes a description from the numbers of [`About::numbers`].
    pub fn from_numbers([format, dtype, location, a, b, c, d]: [i32; 7]) -> Self {
        Self {
            format,
            dtype,
            location,
            shape: [a, b, c, d],
        }
    }
}

/// A value of the store. A clone shares the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The description that came with the value.
    pub about: About,
    /// End of the value's life in milliseconds since 1970; `u64::MAX` means no end. The wall clock is used because the
    /// value may outlive the process.
    pub deadline_ms: u64,
    /// The value.
    pub body: Bytes,
}

impl Entry {
    /// Makes a value that lives for `ttl` from now on; without a `ttl` it has no end.
    pub fn new(about: About, body: Bytes, ttl: Option<Duration>) -> Self {
        let deadline_ms = ttl.map_or(u64::MAX, |ttl| {
            let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX);
            now_ms().saturating_add(ttl)
        });
        Self {
            about,
            deadline_ms,
            body,
        }
    }

    /// Returns true if the life of the value has ended.
    pub fn has_ended(&self) -> bool {
        self.deadline_ms <= now_ms()
    }

    /// Returns the rest of the value's life, or `None` if it has no end.
    pub fn life(&self) -> Option<Duration> {
        let rest = self.deadline_ms.saturating_sub(now_ms());
        (self.deadline_ms != u64::MAX).then(|| Duration::from_millis(rest))
    }

    /// Returns the bytes of memory that the value needs with its key.
    pub fn weight(&self, key: &Key) -> usize {
        self.body.len() + key.len() + OVERHEAD
    }
}

impl Code for Entry {
    fn encode(&self, writer: &mut impl Write) -> Result<()> {
        for number in self.about.numbers() {
            number.encode(writer)?;
        }
        self.deadline_ms.encode(writer)?;
        (self.body.len() as u64).encode(writer)?;
        writer.write_all(&self.body).map_err(Error::io_error)
    }

    fn decode(reader: &mut impl Read) -> Result<Self> {
        let mut numbers = [0i32; 7];
        for number in &mut numbers {
            *number = i32::decode(reader)?;
        }
        let deadline_ms = u64::decode(reader)?;
        let length = u64::decode(reader)?;
        // The cache has checked the checksum, so a wrong length here is a fault of the form and not of the disk. The
        // limit keeps such a fault from asking for all memory.
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_VALUE_BYTES)
            .ok_or_else(|| Error::new(ErrorKind::Parse, format!("a value of {length} bytes")))?;
        let mut body = vec![0; length];
        reader.read_exact(&mut body).map_err(Error::io_error)?;
        Ok(Self {
            about: About::from_numbers(numbers),
            deadline_ms,
            body: body.into(),
        })
    }

    fn estimated_size(&self) -> usize {
        HEAD_BYTES + self.body.len()
    }
}

fn now_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Largest value in bytes, whatever the options say: the length on the wire is a signed number of 32 bits.
pub const MAX_VALUE_BYTES: usize = i32::MAX as usize;
/// Bytes in front of the body on disk: seven numbers of four bytes, two of eight.
const HEAD_BYTES: usize = 7 * 4 + 2 * 8;
/// Memory of an entry besides its key and body, as an estimate: the cache's record, two allocations, the index.
const OVERHEAD: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_back_from_its_form_on_disk() {
        let about = About {
            format: 5,
            dtype: -7,
            location: 2,
            shape: [2, 32, 256, 0],
        };
        let entry = Entry::new(about, Bytes::from_static(b"kv"), None);
        let mut disk = Vec::new();
        entry.encode(&mut disk).unwrap();
        assert_eq!(disk.len(), entry.estimated_size());
        assert_eq!(Entry::decode(&mut &disk[..]).unwrap(), entry);
        assert!(!entry.has_ended());
    }

    #[test]
    fn a_wrong_length_is_an_error_and_takes_no_memory() {
        let entry = Entry::new(About::default(), Bytes::from_static(b"kv"), None);
        let mut disk = Vec::new();
        entry.encode(&mut disk).unwrap();
        disk[36..44].copy_from_slice(&u64::MAX.to_le_bytes());
        let error = Entry::decode(&mut &disk[..]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Parse);
        assert!(Entry::decode(&mut &disk[..20]).is_err());
    }

    #[test]
    fn a_value_ends_at_its_deadline() {
        let of = |ttl| Entry::new(About::default(), Bytes::new(), Some(ttl)).has_ended();
        assert!(of(Duration::ZERO));
        assert!(!of(Duration::from_secs(60)));
        assert!(!of(Duration::MAX));
        let life = |ttl| Entry::new(About::default(), Bytes::new(), ttl).life();
        assert_eq!(life(None), None);
        let rest = life(Some(Duration::from_secs(60))).unwrap();
        assert!((59..=60).contains(&rest.as_secs()), "{rest:?}");
    }
}
