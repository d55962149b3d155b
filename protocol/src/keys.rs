//! LMCache's chunk keys: `model@world_size@rank@hash@dtype`, then any number of `@tag%value`.
//!
//! A receiver compares keys as text and does not compute them. The receiver checks the form of the
//! keys, because LMCache's own code fails with an exception on a key with fewer than five parts.

use std::fmt;

/// The parts of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key<'a> {
    /// Model name, without `@`.
    pub model: &'a str,
    /// Tensor-parallel size of the destination.
    pub world_size: u32,
    /// Tensor-parallel rank of the destination, below `world_size`.
    pub rank: u32,
    /// The chunk's hash: hexadecimal, lower case, unpadded. The hash begins with `-` if Python's `hash()`
    /// gave a negative number.
    pub hash: &'a str,
    /// LMCache's dtype name.
    pub dtype: &'a str,
    /// Tags after the dtype, with their `@`; empty if the tokens alone decide the KV. See PROTOCOL.md.
    pub tags: &'a str,
}

/// Error of [`Key::parse`]: the text is not a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The text is longer than [`MAX_KEY_BYTES`].
    #[error("the key has {0} bytes; at most {MAX_KEY_BYTES} are allowed")]
    TooLong(usize),
    /// The text has fewer than five parts.
    #[error("the key has {0} parts; it needs at least five: model@world_size@rank@hash@dtype")]
    Parts(usize),
    /// A part is empty or malformed.
    #[error("the {0} in the key is empty or malformed")]
    Part(&'static str),
}

impl<'a> Key<'a> {
    /// Parses a key.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn parse(text: &'a str) -> Result<Self, KeyError> {
        if text.len() > MAX_KEY_BYTES {
            return Err(KeyError::TooLong(text.len()));
        }
        let mut parts = text.splitn(5, '@');
        let (Some(model), Some(world_size), Some(rank), Some(hash), Some(rest)) = (
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
            parts.next(),
        ) else {
            return Err(KeyError::Parts(text.split('@').count()));
        };
        let (dtype, tags) = rest.split_at(rest.find('@').unwrap_or(rest.len()));
        let key = Self {
            model: some(model, "model")?,
            world_size: number(world_size, "world_size")?,
            rank: number(rank, "rank")?,
            hash: hexadecimal(hash)?,
            dtype: some(dtype, "dtype")?,
            tags,
        };
        if key.rank >= key.world_size {
            return Err(KeyError::Part("rank"));
        }
        Ok(key)
    }
}

/// Returns true if the key has tags: the KV then depends on more than the tokens.
pub fn is_tagged(key: &str) -> bool {
    Key::parse(key).is_ok_and(|key| !key.tags.is_empty())
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}@{}@{}@{}@{}{}",
            self.model, self.world_size, self.rank, self.hash, self.dtype, self.tags
        )
    }
}

fn some<'a>(text: &'a str, part: &'static str) -> Result<&'a str, KeyError> {
    if text.is_empty() {
        return Err(KeyError::Part(part));
    }
    Ok(text)
}

fn number(text: &str, part: &'static str) -> Result<u32, KeyError> {
    // `parse` alone also accepts a sign before the digits.
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(KeyError::Part(part));
    }
    text.parse().map_err(|_| KeyError::Part(part))
}

fn hexadecimal(text: &str) -> Result<&str, KeyError> {
    let digits = text.strip_prefix('-').unwrap_or(text);
    let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    if digits.is_empty() || digits.len() > MAX_HASH_DIGITS || !digits.bytes().all(lower) {
        return Err(KeyError::Part("hash"));
    }
    Ok(text)
}

/// Maximum length of a key in bytes. With a model name of 255 characters there is still room for
/// tags.
pub const MAX_KEY_BYTES: usize = 1024;
/// Maximum number of digits of a hash: the number of digits of a complete SHA-256. LMCache truncates the hash to 16
/// digits.
const MAX_HASH_DIGITS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back() {
        let check = |text: &str, expected: (&str, u32, u32, &str, &str, &str)| {
            let key = Key::parse(text).unwrap();
            let parts = (
                key.model,
                key.world_size,
                key.rank,
                key.hash,
                key.dtype,
                key.tags,
            );
            assert_eq!(parts, expected);
            assert_eq!(key.to_string(), text);
        };
        check("m@1@0@12ab@bfloat16", ("m", 1, 0, "12ab", "bfloat16", ""));
        check("m@1@0@-3c@bfloat16", ("m", 1, 0, "-3c", "bfloat16", ""));
        check(
            "org/Model-7B@8@7@b8a960cfcc69e7a5@half@salt%x@lora%y",
            (
                "org/Model-7B",
                8,
                7,
                "b8a960cfcc69e7a5",
                "half",
                "@salt%x@lora%y",
            ),
        );
        assert!(is_tagged("m@1@0@12ab@half@salt%x"));
        assert!(!is_tagged("m@1@0@12ab@half"));
        assert!(!is_tagged("no key"));
    }

    #[test]
    fn other_texts_are_refused() {
        let check = |text: &str, error| assert_eq!(Key::parse(text), Err(error), "{text}");
        check("", KeyError::Parts(1));
        check("m@1@0@12ab", KeyError::Parts(4));
        check("@1@0@12ab@half", KeyError::Part("model"));
        check("m@x@0@12ab@half", KeyError::Part("world_size"));
        check("m@+1@0@12ab@half", KeyError::Part("world_size"));
        check("m@4294967296@0@12ab@half", KeyError::Part("world_size"));
        check("m@1@-1@12ab@half", KeyError::Part("rank"));
        check("m@2@2@12ab@half", KeyError::Part("rank"));
        check("m@1@0@@half", KeyError::Part("hash"));
        check("m@1@0@-@half", KeyError::Part("hash"));
        check("m@1@0@12AB@half", KeyError::Part("hash"));
        check("m@1@0@0x12@half", KeyError::Part("hash"));
        check("m@1@0@12ab@", KeyError::Part("dtype"));
        check("m@1@0@12ab@@tag%1", KeyError::Part("dtype"));
        let long = format!("{}@1@0@12ab@half", "m".repeat(MAX_KEY_BYTES));
        check(&long, KeyError::TooLong(long.len()));
    }
}
