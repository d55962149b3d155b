//! msgpack in and out, as msgspec writes and reads it.
//!
//! A message is one map whose key `type` names it. What a peer sends is walked once without any
//! allocation ([`scan`]) and refused if it exceeds a cap, and only then decoded, by a reader that
//! takes each field in exactly the form that msgspec would: text as str, bytes as bin, numbers as
//! integers of any width, structs as maps. Unknown keys are skipped and the order of keys is free, so
//! that either side may be newer.

use serde::{Deserialize, Serialize};

use crate::local::{ToEngine, ToSidecar};
use crate::message::{Init, Query, ToReceiver, ToSender};
use crate::registration::ToProxy;

mod read;
mod scan;

/// A frame that is not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// More than [`MAX_BYTES`].
    #[error("message of {0} bytes, more than {MAX_BYTES}")]
    TooLong(usize),
    /// More nesting, elements or text than any message has.
    #[error("message exceeds the limit on {0}")]
    Limit(&'static str),
    /// No well-formed msgpack, or bytes after it.
    #[error("malformed message: {0}")]
    Malformed(&'static str),
    /// A map, but of no message that this version knows here. A newer peer may send such.
    #[error("unknown message {0:?}")]
    UnknownType(String),
    /// A known message with a field that is missing or of another form.
    #[error("malformed {message}: {cause}")]
    Field {
        /// The message's `type`.
        message: &'static str,
        /// Which field, and what is wrong with it.
        cause: String,
    },
}

/// Encodes a message as a msgpack map with field names.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Serialising plain structs into memory cannot fail: no map has non-string keys, no length is
    // unknown.
    rmp_serde::to_vec_named(message).expect("plain structs serialise")
}

/// Decodes a message.
///
/// # Errors
/// Anything that is not one well-formed message of the expected set within the caps.
pub fn decode<T: Message>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > MAX_BYTES {
        return Err(DecodeError::TooLong(bytes.len()));
    }
    let tag = scan::scan(bytes)?;
    T::of_type(tag, bytes)
}

/// The messages that one socket may carry.
pub trait Message: Sized {
    /// The values of `type` that name them.
    const NAMES: &'static [&'static str];

    /// Decodes the message that `tag` names from a map that has been scanned.
    ///
    /// # Errors
    /// See [`decode`].
    #[doc(hidden)]
    fn of_type(tag: &str, bytes: &[u8]) -> Result<Self, DecodeError>;
}

/// Picks the variant by name and reads its struct directly; serde's own tagged enums would first copy
/// everything into an untyped tree, in which text and bytes are the same.
macro_rules! messages {
    ($($set:ident { $($name:ident),* $(,)? })*) => {$(
        impl Message for $set {
            const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            fn of_type(tag: &str, bytes: &[u8]) -> Result<Self, DecodeError> {
                match tag {
                    $(stringify!($name) => of_type(stringify!($name), bytes).map(Self::$name),)*
                    other => Err(DecodeError::UnknownType(other.to_owned())),
                }
            }
        }

        // A variant that is missing above fails here.
        const _: fn(&$set) = |message| match message {
            $($set::$name(_) => {})*
        };
    )*};
}

messages! {
    Init { NixlInitRequest, NixlInitResponse, NixlMemRegRequest, NixlMemRegResponse }
    Query { CacheQueryRequest, CacheQueryResponse }
    ToReceiver { AllocRequest, CancelNotif, Writing, Written, Extend }
    ToSender { AllocResponse, More, Ack, Unwanted }
    ToProxy { Register, Leave, Progress, ProxyNotif }
    ToSidecar { Hello, Reserve, Computing, Staged, Cancel, Await, Release, Abort }
    ToEngine { Welcome, Refused, Granted, Ready, Ended }
}

fn of_type<'de, T: Deserialize<'de>>(
    message: &'static str,
    bytes: &'de [u8],
) -> Result<T, DecodeError> {
    read::read(bytes).map_err(|error| DecodeError::Field {
        message,
        cause: error.to_string(),
    })
}

/// Longest message on any socket: an init answer with 170,000 slots. Sockets have tighter limits.
pub const MAX_BYTES: usize = 4 << 20;
/// Maps and lists within each other; ours go to 4.
pub const MAX_DEPTH: usize = 8;
/// Elements of all maps and lists together. A request of a million tokens in chunks of 64 has 16,384
/// chunks, and up to three lists name each.
pub const MAX_ELEMENTS: usize = 1 << 17;
/// Bytes of one text: a key with a long model name has some hundred, a refusal some more.
pub const MAX_TEXT_BYTES: usize = 4096;

#[cfg(test)]
mod tests;
