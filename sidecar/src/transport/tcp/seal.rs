//! Protects the frames of one connection with an AEAD (AES-128-GCM).
//!
//! # Keys
//! A connection that is protected begins with a TLS 1.3 handshake, in which both ends prove keys of the roster. The frames
//! after it are no TLS records: each end exports two secrets from the handshake (RFC 8446, section 7.5), one for each
//! direction. This was chosen over keys that the init channel agrees on, for four reasons. The secrets are new for each
//! connection, so no counter need survive a reconnection or a restart. The receiver keeps no state between the init handshake and
//! the data. The connection itself proves who writes, so a lease can be bound to the principal. And whoever learns a long-term
//! key later cannot read recorded KV.
//!
//! # Nonces
//! The nonce is the number of the message in its direction. Both ends count, and no number is on the wire. So a message
//! that is repeated, left out, reordered, or taken from another connection or direction has another nonce or another key, and its
//! tag is wrong. After [`MESSAGES_PER_KEY`] messages the key is replaced (RFC 5869), so that no key protects more bytes than
//! AES-GCM permits.

use std::fmt;

use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Prk};
use tokio_rustls::rustls::{self, ConnectionCommon};

use crate::transport::protection::Protection;

/// A message whose tag is wrong.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Forged;

/// One direction of a connection. The sender's and the receiver's value of one direction count in step.
pub(super) struct Seal {
    secret: [u8; SECRET_BYTES],
    key: LessSafeKey,
    /// Number of messages under this key so far.
    number: u64,
    per_key: u64,
    encrypts: bool,
}

/// Both directions of a connection, as one end has them.
#[derive(Debug)]
pub(super) struct Seals {
    /// For messages that this end sends.
    pub(super) out: Seal,
    /// For messages that this end receives.
    pub(super) back: Seal,
}

impl Seal {
    fn new(secret: [u8; SECRET_BYTES], protection: Protection) -> Self {
        Self {
            key: key(&secret),
            secret,
            number: 0,
            per_key: MESSAGES_PER_KEY,
            encrypts: protection == Protection::Sealed,
        }
    }

    /// Returns true if the bytes of parts are encrypted.
    pub(super) fn encrypts(&self) -> bool {
        self.encrypts
    }

    /// Appends the tag of the whole message to it.
    pub(super) fn sign(&mut self, message: &mut Vec<u8>) {
        let tag = self.tag(message);
        message.extend_from_slice(&tag);
    }

    /// Returns the tag of a message that is not encrypted.
    pub(super) fn tag(&mut self, message: &[u8]) -> [u8; TAG_BYTES] {
        let nonce = self.next();
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(message), &mut []);
        // The cipher only refuses messages of more than 64 GiB.
        let tag = tag.expect("a message of a permitted length");
        let mut bytes = [0; TAG_BYTES];
        bytes.copy_from_slice(tag.as_ref());
        bytes
    }

    /// Checks the tag of a message that is not encrypted.
    pub(super) fn check(&mut self, message: &[u8], tag: &[u8]) -> Result<(), Forged> {
        let nonce = self.next();
        self.key
            .open_separate_gather(nonce, Aad::from(message), &[], tag, &mut [])
            .map_err(|_| Forged)
    }

    /// Encrypts bytes into `into`, which must have room for the bytes and a tag.
    pub(super) fn encrypt(&mut self, bytes: &[u8], into: &mut [u8]) {
        let nonce = self.next();
        let sealed = self
            .key
            .seal_in_place_scatter(nonce, Aad::empty(), &mut [], bytes, into);
        sealed.expect("a message of a permitted length, and room for it");
    }

    /// Decrypts into `into`, which has as many bytes as `bytes`. If the tag is wrong, `into` has undefined bytes.
    pub(super) fn decrypt(
        &mut self,
        bytes: &[u8],
        tag: &[u8],
        into: &mut [u8],
    ) -> Result<(), Forged> {
        let nonce = self.next();
        self.key
            .open_separate_gather(nonce, Aad::empty(), bytes, tag, into)
            .map_err(|_| Forged)
    }

    /// Passes over messages whose bytes are dropped unread.
    pub(super) fn skip(&mut self, messages: u64) {
        for _ in 0..messages {
            self.next();
        }
    }

    fn next(&mut self) -> Nonce {
        if self.number == self.per_key {
            self.secret = expand(&self.secret, b"pd-sidecar next");
            self.key = key(&self.secret);
            self.number = 0;
        }
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&self.number.to_be_bytes());
        self.number += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

impl Seals {
    /// Makes the two directions of an end from its TLS connection; `None` if the data is plain.
    pub(super) fn of_tls<D>(
        protection: Protection,
        is_sender: bool,
        tls: &ConnectionCommon<D>,
    ) -> Result<Option<Self>, rustls::Error> {
        if protection == Protection::Plain {
            return Ok(None);
        }
        let export = |out: &mut [u8], label: &[u8], context: &[u8]| {
            let exported = tls.export_keying_material(out, label, Some(context));
            exported.map(|_| ())
        };
        Self::new(protection, is_sender, export).map(Some)
    }

    /// Makes the two directions of an end. `export` fills a secret for a label and a context; both ends of one TLS
    /// connection get the same secret, and nobody else does.
    fn new<E>(
        protection: Protection,
        is_sender: bool,
        export: impl Fn(&mut [u8], &[u8], &[u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let of = |direction: u8| {
            let mut secret = [0; SECRET_BYTES];
            // The protection is part of the context: no key is used in two ways.
            export(&mut secret, LABEL, &[protection.code(), direction])?;
            Ok(Seal::new(secret, protection))
        };
        let (to_receiver, to_sender) = (of(1)?, of(2)?);
        Ok(match is_sender {
            true => Self {
                out: to_receiver,
                back: to_sender,
            },
            false => Self {
                out: to_sender,
                back: to_receiver,
            },
        })
    }

    /// Returns the protection that these directions give.
    pub(super) fn protection(&self) -> Protection {
        match self.out.encrypts {
            true => Protection::Sealed,
            false => Protection::Authenticated,
        }
    }

    #[cfg(test)]
    pub(super) fn replace_keys_after(&mut self, messages: u64) {
        self.out.per_key = messages;
        self.back.per_key = messages;
    }
}

impl fmt::Debug for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seal")
            .field("number", &self.number)
            .field("encrypts", &self.encrypts)
            .finish_non_exhaustive()
    }
}

fn key(secret: &[u8; SECRET_BYTES]) -> LessSafeKey {
    let bytes = expand::<KEY_BYTES>(secret, b"pd-sidecar key");
    let key = UnboundKey::new(&AES_128_GCM, &bytes).expect("the cipher's length of keys");
    LessSafeKey::new(key)
}

fn expand<const N: usize>(secret: &[u8; SECRET_BYTES], label: &[u8]) -> [u8; N] {
    struct Bytes(usize);
    impl KeyType for Bytes {
        fn len(&self) -> usize {
            self.0
        }
    }
    let mut out = [0; N];
    Prk::new_less_safe(HKDF_SHA256, secret)
        .expand(&[label], Bytes(N))
        .and_then(|okm| okm.fill(&mut out))
        .expect("a permitted length");
    out
}

/// Bytes of a tag, which follows each message.
pub(super) const TAG_BYTES: usize = 16;
const SECRET_BYTES: usize = 32;
const KEY_BYTES: usize = 16;
const LABEL: &[u8] = b"EXPORTER-pd-sidecar-data-1";
/// A message has at most 256 KiB, so a key protects at most 256 GiB. TLS 1.3 permits 1.4 times as much for a key of this cipher.
const MESSAGES_PER_KEY: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(protection: Protection) -> (Seals, Seals) {
        let export = |out: &mut [u8], label: &[u8], context: &[u8]| {
            out.fill(context[0] * 16 + context[1]);
            assert_eq!(label, LABEL);
            Ok::<_, ()>(())
        };
        let end = |is_sender| {
            let mut end = Seals::new(protection, is_sender, export).unwrap();
            end.replace_keys_after(3);
            end
        };
        (end(true), end(false))
    }

    /// Each message passes once, in its order, in its direction. The key changes after three messages.
    #[test]
    fn a_message_passes_once_and_in_its_order() {
        let (mut sender, mut receiver) = ends(Protection::Authenticated);
        let messages: Vec<Vec<u8>> = (0..10).map(|i| vec![i; 100]).collect();
        let tags: Vec<_> = messages.iter().map(|m| sender.out.tag(m)).collect();
        for (i, (message, tag)) in messages.iter().zip(&tags).enumerate() {
            // Neither an earlier nor a later message passes in place of this one, nor does this one with another tag, nor
            // in the other direction. Each attempt uses up a number, so each has ends of its own.
            for (what, other, with) in [
                ("repeated", i.saturating_sub(1), i.saturating_sub(1)),
                ("reordered", (i + 1) % 10, (i + 1) % 10),
                ("swapped", i, (i + 3) % 10),
            ] {
                let (_, mut fresh) = ends(Protection::Authenticated);
                fresh.back.skip(i as u64);
                let passes = fresh.back.check(&messages[other], &tags[with]);
                let expect = if (other, with) == (i, i) {
                    Ok(())
                } else {
                    Err(Forged)
                };
                assert_eq!(passes, expect, "{what} {i}");
            }
            let (mut fresh, _) = ends(Protection::Authenticated);
            fresh.back.skip(i as u64);
            assert_eq!(fresh.back.check(message, tag), Err(Forged), "direction");
            assert_eq!(receiver.back.check(message, tag), Ok(()));
        }
    }

    #[test]
    fn each_changed_bit_is_noticed() {
        let (mut sender, _) = ends(Protection::Sealed);
        let clear = [7_u8; 64];
        let mut sealed = [0; 64 + TAG_BYTES];
        sender.out.encrypt(&clear, &mut sealed);
        assert!(!sealed.windows(8).any(|w| w == [7; 8]));
        for bit in 0..sealed.len() * 8 {
            let mut changed = sealed;
            changed[bit / 8] ^= 1 << (bit % 8);
            let (_, mut receiver) = ends(Protection::Sealed);
            let (bytes, tag) = changed.split_at(64);
            assert_eq!(receiver.back.decrypt(bytes, tag, &mut [0; 64]), Err(Forged));
        }
        let (_, mut receiver) = ends(Protection::Sealed);
        let mut out = [0; 64];
        let (bytes, tag) = sealed.split_at(64);
        assert_eq!(receiver.back.decrypt(bytes, tag, &mut out), Ok(()));
        assert_eq!(out, clear);
    }

    #[test]
    fn no_nonce_comes_twice_under_one_key() {
        let (mut sender, _) = ends(Protection::Authenticated);
        let tags: std::collections::BTreeSet<_> = (0..100).map(|_| sender.out.tag(b"x")).collect();
        assert_eq!(tags.len(), 100, "equal messages never have equal tags");
    }
}
