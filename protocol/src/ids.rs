//! Newtypes for all numbers, names and indexes of the protocol.

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

use serde::{Deserialize, Serialize};

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// Number that identifies one start of a sidecar. The number is random and never 0. A sidecar
    /// takes a new number at each start and after each change of its layout.
    Epoch(u64)
}
number! {
    /// Id of a lease: the receiver's permission to write into slots. The id is random, so that no
    /// other process can guess it.
    LeaseId(u64)
}
number! {
    /// Index of a slot of a send or landing buffer; a slot holds one chunk of KV. In LMCache's
    /// messages this is the page number.
    SlotIndex(u32)
}
number! {
    /// Index of a chunk in its request, as in a [`Plan`](crate::plan::Plan).
    ChunkIndex(u32)
}
number! {
    /// Id of one connection of an engine worker to the sidecar's local socket.
    EngineId(u64)
}
number! {
    /// Id of one write of a sender.
    TransferId(u64)
}

/// Id that the proxy gives a request. The prefill request, the decode request, both sidecars and
/// all logs use this id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(pub String);

impl RequestId {
    /// Returns the id of the client's request. The connector appends `/` and the number of the prompt
    /// to the ids of the second and later prompts of a list.
    pub fn of_client(&self) -> &str {
        self.0.split_once('/').map_or(&self.0, |(id, _)| id)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<&str> for RequestId {
    fn from(id: &str) -> Self {
        Self(id.to_owned())
    }
}

/// Name of KV that a prefill engine keeps: 32 hexadecimal digits, random, so that only a process that
/// was given the token can fetch the KV. No log and no metric may hold a whole token.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub String);

impl Token {
    /// Returns true if the text has the form of a token.
    pub fn is_sound(&self) -> bool {
        self.0.len() == TOKEN_DIGITS
            && self
                .0
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }
}

/// Shows the first digits only.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: String = self.0.chars().take(4).collect();
        write!(f, "Token({shown}…)")
    }
}

/// Hexadecimal digits of a token: 128 bits.
const TOKEN_DIGITS: usize = 32;

/// Time in microseconds since an origin that the caller of the state machines chooses, such as its
/// own start.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Time(pub u64);

impl Time {
    /// Returns the microseconds from `earlier` to `self`; 0 if `earlier` comes after `self`.
    pub fn micros_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Time {
    type Output = Self;
    fn add(self, rhs: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(rhs.as_micros()).unwrap_or(u64::MAX)),
        )
    }
}

impl Sub for Time {
    type Output = Duration;
    fn sub(self, rhs: Self) -> Duration {
        Duration::from_micros(self.micros_since(rhs))
    }
}
