//! Public keys: their text in files and logs, and their bytes in a TLS handshake.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// An Ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

/// A text that is not a public key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a public key: write ed25519: and the 43 characters that keygen printed")]
pub struct NotAKey;

impl PublicKey {
    /// Returns the key with these bytes.
    pub(super) fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Returns the key of a SubjectPublicKeyInfo, which is the form of a key in TLS; `None` if the bytes are not the
    /// SubjectPublicKeyInfo of an Ed25519 key.
    pub fn of_spki(spki: &[u8]) -> Option<Self> {
        let key = spki.strip_prefix(SPKI_HEAD)?;
        Some(Self(key.try_into().ok()?))
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{KIND}{}", URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = NotAKey;

    fn from_str(text: &str) -> Result<Self, NotAKey> {
        let bytes = text
            .strip_prefix(KIND)
            .and_then(|key| URL_SAFE_NO_PAD.decode(key).ok());
        let bytes: [u8; 32] = bytes.ok_or(NotAKey)?.try_into().map_err(|_| NotAKey)?;
        Ok(Self(bytes))
    }
}

/// Prefix of a key's text.
const KIND: &str = "ed25519:";

/// The bytes before an Ed25519 key in its SubjectPublicKeyInfo (RFC 8410): the sequence, the algorithm 1.3.101.112 and
/// the head of the bit string.
const SPKI_HEAD: &[u8] = &[
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
