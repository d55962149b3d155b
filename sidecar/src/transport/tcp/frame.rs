//! Encodes the frames between the two ends, little-endian throughout.
//!
//! ```text
//! sender                                   receiver
//!   │ Hello{version, slots, slot_bytes} ─────▶│   within the handshake timeout
//!   │◀──────────────── Answer{Welcome | Refused} │
//!   │ Write{batch, lease, pieces} + bytes ───▶│   any number, pipelined
//!   │ Write{…} + bytes ──────────────────────▶│
//!   │◀────── Answer{Landed | Refused, batch}  │   one for each Write, in order
//! ```
//!
//! A `Write` is a header, its parts, and then the bytes of all parts without gaps. Every field is checked
//! before the first byte lands.

use protocol::LeaseId;

/// The version of this wire.
pub(super) const VERSION: u32 = 1;

/// Maximum number of parts of one `Write`. The number limits the memory that the receiver allocates for a
/// header (24 KiB).
pub(super) const MAX_PIECES: usize = 1024;

/// The first frame of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hello {
    /// The sender's version of this wire.
    pub(super) version: u32,
    /// The number of slots that the sender knows from the init handshake.
    pub(super) slots: u32,
    /// Bytes of each slot.
    pub(super) slot_bytes: u64,
}

impl Hello {
    pub(super) const BYTES: usize = 24;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&self.version.to_le_bytes());
        out[12..16].copy_from_slice(&self.slots.to_le_bytes());
        out[16..].copy_from_slice(&self.slot_bytes.to_le_bytes());
        out
    }

    /// Decodes a hello; `None` if the bytes do not belong to this protocol.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        bytes.starts_with(&MAGIC).then(|| Self {
            version: u32_at(bytes, 8),
            slots: u32_at(bytes, 12),
            slot_bytes: u64_at(bytes, 16),
        })
    }

    /// Returns true if the first bytes of a connection may still become a hello.
    pub(super) fn begins_well(bytes: &[u8]) -> bool {
        let common = bytes.len().min(MAGIC.len());
        bytes[..common] == MAGIC[..common]
    }
}

/// A part of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// The slot's number in the receiver's buffer.
    pub(super) slot: u32,
    /// The part's first byte, as an offset in the slot.
    pub(super) offset: u64,
    /// Bytes of the part; not 0.
    pub(super) bytes: u64,
}

/// The head of a `Write`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Write {
    /// The number of parts that follow: 1 to [`MAX_PIECES`].
    pub(super) parts: u32,
    /// The sender's number for this write; the answer has the same number.
    pub(super) batch: u64,
    /// The lease under which the slots are open to this write.
    pub(super) lease: LeaseId,
}

impl Write {
    pub(super) const BYTES: usize = 24;

    pub(super) fn encode(self, parts: &[Part]) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::BYTES + parts.len() * Part::BYTES);
        out.extend_from_slice(&WRITE.to_le_bytes());
        out.extend_from_slice(&self.parts.to_le_bytes());
        out.extend_from_slice(&self.batch.to_le_bytes());
        out.extend_from_slice(&self.lease.0.to_le_bytes());
        for part in parts {
            out.extend_from_slice(&part.encode());
        }
        out
    }

    /// Decodes a write's head; `None` if the bytes are not a valid head.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let parts = u32_at(bytes, 4);
        let sane = (1..=MAX_PIECES).contains(&usize::try_from(parts).ok()?);
        (u32_at(bytes, 0) == WRITE && sane).then(|| Self {
            parts,
            batch: u64_at(bytes, 8),
            lease: LeaseId(u64_at(bytes, 16)),
        })
    }
}

impl Part {
    pub(super) const BYTES: usize = 24;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..4].copy_from_slice(&self.slot.to_le_bytes());
        out[8..16].copy_from_slice(&self.offset.to_le_bytes());
        out[16..].copy_from_slice(&self.bytes.to_le_bytes());
        out
    }

    /// Decodes a part; `None` if the part is empty or the reserved field is not 0.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let part = Self {
            slot: u32_at(bytes, 0),
            offset: u64_at(bytes, 8),
            bytes: u64_at(bytes, 16),
        };
        (u32_at(bytes, 4) == 0 && part.bytes > 0).then_some(part)
    }
}

/// The receiver's answer to the hello or to a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The hello is accepted.
    Welcome,
    /// Every byte of the batch is in its slots.
    Landed { batch: u64 },
    /// From now on no byte of the batch lands. `batch` is 0 if the receiver refuses the whole connection.
    Refused { batch: u64, why: Refusal },
}

impl Answer {
    pub(super) const BYTES: usize = 16;

    pub(super) fn encode(self) -> [u8; Self::BYTES] {
        let (kind, code, batch) = match self {
            Self::Welcome => (WELCOME, 0, 0),
            Self::Landed { batch } => (LANDED, 0, batch),
            Self::Refused { batch, why } => (REFUSED, why.code(), batch),
        };
        let mut out = [0; Self::BYTES];
        out[..4].copy_from_slice(&kind.to_le_bytes());
        out[4..8].copy_from_slice(&code.to_le_bytes());
        out[8..].copy_from_slice(&batch.to_le_bytes());
        out
    }

    /// Decodes an answer; `None` if the bytes are not a valid answer.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let batch = u64_at(bytes, 8);
        match u32_at(bytes, 0) {
            WELCOME => Some(Self::Welcome),
            LANDED => Some(Self::Landed { batch }),
            REFUSED => Some(Self::Refused {
                batch,
                why: Refusal::from_code(u32_at(bytes, 4)),
            }),
            _ => None,
        }
    }
}

macro_rules! refusals {
    ($($(#[$doc:meta])* $name:ident = $code:literal $label:literal $text:literal,)*) => {
        /// The reason why the receiver refused a frame or a connection.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
        pub(crate) enum Refusal {
            $($(#[$doc])* #[error($text)] $name,)*
        }

        impl Refusal {
            /// All refusals, in the order of [`Refusal::index`].
            pub(crate) const ALL: &'static [Self] = &[$(Self::$name,)*];

            fn code(self) -> u32 {
                match self { $(Self::$name => $code,)* }
            }

            fn from_code(code: u32) -> Self {
                match code { $($code => Self::$name,)* _ => Self::Malformed }
            }

            /// Returns the counter's label.
            pub(crate) fn as_str(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }
        }
    };
}

refusals! {
    /// The bytes are not of this protocol, or a frame is broken.
    Malformed = 1 "refused_malformed" "a frame is not valid",
    /// The sender has another version of this wire.
    Version = 2 "refused_version" "the two sides speak different versions of this transport",
    /// The sender has another slot layout than the receiver.
    Geometry = 3 "refused_geometry" "the slot layout of the landing buffer has changed since the handshake",
    /// No engine has set the slot layout yet.
    NoSlots = 4 "refused_no_slots" "the landing buffer has no slots yet",
    /// The slot was never open to the lease, or it is closed again.
    Closed = 5 "refused_closed" "the slot is not open under this lease",
    /// A part has more bytes than its slot, or the slot does not exist.
    Bounds = 6 "refused_bounds" "a piece does not fit into its slot",
    /// The sender was too slow.
    Stalled = 7 "refused_stalled" "no byte came for too long",
    /// The receiver has too many connections.
    Busy = 8 "refused_busy" "too many connections",
    /// The receiver takes only protected connections.
    Unprotected = 9 "refused_unprotected" "the receiver's sidecar.data is not plain: give this sidecar a key of its roster",
    /// The peer has proved no key that the roster permits here.
    Key = 10 "refused_key" "the connection has proved no key of a sender in the receiver's roster",
    /// A tag is wrong.
    Forged = 11 "refused_forged" "a tag is wrong: bytes were changed, repeated or reordered on the way",
}

impl Refusal {
    /// Returns the position in [`Refusal::ALL`].
    pub(crate) fn index(self) -> usize {
        // The codes count from 1 in the order of declaration, which a test checks.
        self.code() as usize - 1
    }
}

/// The first bytes of a hello. These bytes are not text, so that no line-based protocol sends them by
/// accident.
const MAGIC: [u8; 8] = *b"\x89pdkv\r\n\0";
const WRITE: u32 = 0x5752_0001;
const WELCOME: u32 = 0x4157_0001;
const LANDED: u32 = 0x414c_0001;
const REFUSED: u32 = 0x4152_0001;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(out)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn frames_survive_the_wire() {
        let hello = Hello {
            version: 7,
            slots: 9,
            slot_bytes: 1 << 40,
        };
        assert_eq!(Hello::decode(&hello.encode()), Some(hello));
        let part = Part {
            slot: 3,
            offset: 5,
            bytes: u64::MAX,
        };
        let write = Write {
            parts: 1,
            batch: 11,
            lease: LeaseId(u64::MAX - 1),
        };
        let bytes = write.encode(&[part]);
        assert_eq!(bytes.len(), Write::BYTES + Part::BYTES);
        assert_eq!(Write::decode(bytes[..24].try_into().unwrap()), Some(write));
        assert_eq!(Part::decode(bytes[24..].try_into().unwrap()), Some(part));
        let mut answers = vec![Answer::Welcome, Answer::Landed { batch: 4 }];
        answers.extend(
            Refusal::ALL
                .iter()
                .map(|&why| Answer::Refused { batch: 1, why }),
        );
        for answer in answers {
            assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let mut hello = Hello {
            version: 1,
            slots: 1,
            slot_bytes: 1,
        }
        .encode();
        hello[7] = 1;
        assert_eq!(Hello::decode(&hello), None);
        assert!(Hello::begins_well(&hello[..7]) && !Hello::begins_well(&hello));
        assert!(Hello::begins_well(b"") && !Hello::begins_well(b"GET / HTTP/1.1\r\n"));
        for parts in [0, u32::try_from(MAX_PIECES).unwrap() + 1, u32::MAX] {
            let head = Write {
                parts,
                batch: 0,
                lease: LeaseId(0),
            };
            assert_eq!(
                Write::decode(head.encode(&[])[..].try_into().unwrap()),
                None
            );
        }
        assert_eq!(Write::decode(&[0; 24]), None);
        assert_eq!(Part::decode(&[0; 24]), None);
        assert_eq!(Part::decode(&[1; 24]), None);
        assert_eq!(Answer::decode(&[0; 16]), None);
    }

    /// Checks that, if random bytes can be decoded, the encoded result equals these bytes.
    #[test]
    fn no_bytes_mean_two_things() {
        let mut random = StdRng::seed_from_u64(4);
        for round in 0..200_000_u32 {
            let mut bytes = [0; 24];
            random.fill(&mut bytes[..]);
            match round % 4 {
                0 => bytes[..8].copy_from_slice(&MAGIC),
                1 => {
                    bytes[..4].copy_from_slice(&WRITE.to_le_bytes());
                    bytes[4..8].copy_from_slice(&random.random_range(0..2000_u32).to_le_bytes());
                }
                2 => bytes[4..8].fill(0),
                _ => {
                    let kind = [WELCOME, LANDED, REFUSED][random.random_range(0..3)];
                    bytes[..4].copy_from_slice(&kind.to_le_bytes());
                    bytes[4..8].copy_from_slice(&random.random_range(0..12_u32).to_le_bytes());
                }
            }
            if let Some(hello) = Hello::decode(&bytes) {
                assert_eq!(hello.encode(), bytes);
            }
            if let Some(write) = Write::decode(&bytes) {
                assert!((1..=MAX_PIECES).contains(&(write.parts as usize)));
                assert_eq!(write.encode(&[]), bytes);
            }
            if let Some(part) = Part::decode(&bytes) {
                assert!(part.bytes > 0);
                assert_eq!(part.encode(), bytes);
            }
            let mut answer = [0; Answer::BYTES];
            answer.copy_from_slice(&bytes[..Answer::BYTES]);
            if let Some(answer) = Answer::decode(&answer) {
                assert_eq!(Answer::decode(&answer.encode()), Some(answer));
            }
        }
    }

    #[test]
    fn refusals_are_indexed_by_their_code() {
        for (index, why) in Refusal::ALL.iter().enumerate() {
            assert_eq!(why.index(), index);
        }
    }
}
