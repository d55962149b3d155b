//! Encodes and decodes msgpack as msgspec does.
//!
//! A message is one map; its key `type` names the message. The decoder first walks a peer's bytes
//! without allocation ([`scan`]) and refuses messages that exceed a limit. Then the decoder reads
//! the message. It accepts each field in exactly the form that msgspec accepts: text as str, bytes
//! as bin, numbers as integers of any width, structs as maps. The decoder skips unknown keys and
//! accepts keys in any order, so a peer with a newer version can add fields.

use serde::{Deserialize, Serialize};

use crate::keep::{ToFetcher, ToKeeper};
use crate::local::{ToEngine, ToSidecar};
use crate::message::{Init, Query, ToReceiver, ToSender};
use crate::registration::{FromProxy, ToProxy};

mod read;
mod scan;

/// Error of [`decode`]: the frame is not a valid message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The frame is longer than [`MAX_BYTES`].
    #[error("the message has {0} bytes; at most {MAX_BYTES} are allowed")]
    TooLong(usize),
    /// The message has more nesting, elements or text than any valid message.
    #[error(
        "the message exceeds the limit on {0}: at most {MAX_TEXT_BYTES} bytes in a text, {MAX_DEPTH} levels, \
         {MAX_ELEMENTS} elements"
    )]
    Limit(&'static str),
    /// The frame is not well-formed msgpack, or bytes follow the message.
    #[error("malformed message: {0}")]
    Malformed(&'static str),
    /// The message's type is unknown on this socket. A newer peer may send such messages.
    #[error("unknown message type {0:?}")]
    UnknownType(String),
    /// A field of a known message is missing or malformed.
    #[error("malformed {message}: {cause}")]
    Field {
        /// The message's `type`.
        message: &'static str,
        /// Name of the field and description of the fault.
        cause: String,
    },
}

/// Encodes a message as a msgpack map with field names.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Serialising plain structs into memory cannot fail: all keys of maps are strings, and every
    // length is known.
    rmp_serde::to_vec_named(message).expect("plain structs serialise")
}

/// Decodes a message.
///
/// # Errors
/// Returns an error if the bytes are not exactly one well-formed message of the expected set within
/// the limits.
pub fn decode<T: Message>(bytes: &[u8]) -> Result<T, DecodeError> {
    if bytes.len() > MAX_BYTES {
        return Err(DecodeError::TooLong(bytes.len()));
    }
    let tag = scan::scan(bytes)?;
    T::of_type(tag, bytes)
}

/// Set of messages that one socket carries.
pub trait Message: Sized {
    /// Values that the key `type` can have in this set.
    const NAMES: &'static [&'static str];

    /// Decodes the message with type `tag` from a map that has been scanned.
    ///
    /// # Errors
    /// See [`decode`].
    #[doc(hidden)]
    fn of_type(tag: &str, bytes: &[u8]) -> Result<Self, DecodeError>;
}

/// Selects the variant by name and reads its struct directly. Serde's tagged enums would first copy
/// the message into an untyped tree, which does not distinguish text from bytes.
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

        // If the macro's list lacks a variant, the compiler reports this `match`.
        const _: fn(&$set) = |message| match message {
            $($set::$name(_) => {})*
        };
    )*};
}

messages! {
    Init { NixlInitRequest, NixlInitResponse, NixlMemRegRequest, NixlMemRegResponse }
    ToKeeper { Fetch, Renew, Drop }
    ToFetcher { Gone }
    Query { CacheQueryRequest, CacheQueryResponse }
    ToReceiver { AllocRequest, CancelNotif, Writing, Written, Extend }
    ToSender { AllocResponse, More, Ack, Unwanted }
    ToProxy { Register, Leave, Progress, ProxyNotif }
    FromProxy { Registered, Peers }
    ToSidecar { Hello, Reserve, Keep, Computing, Staged, Cancel, Expect, Await, Release, Abort, Drain }
    ToEngine { Welcome, Refused, Granted, Ready, Ended, Drained }
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

/// Maximum length of a message on any socket, in bytes: an init answer with 170,000 slots. Most
/// sockets have smaller limits.
pub const MAX_BYTES: usize = 4 << 20;
/// Maximum number of levels of nested maps and lists. Valid messages have at most 4.
pub const MAX_DEPTH: usize = 8;
/// Maximum number of elements of all maps and lists together. Up to three lists of a message have
/// one element per chunk, and a request of a million tokens in chunks of 64 has 16,384 chunks.
pub const MAX_ELEMENTS: usize = 1 << 17;
/// Maximum length of one text in bytes. A key with a long model name has a few hundred bytes; a
/// refusal's text is slightly longer.
pub const MAX_TEXT_BYTES: usize = 4096;

#[cfg(test)]
mod tests;
