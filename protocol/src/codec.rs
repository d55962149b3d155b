//! msgpack in and out.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A frame that is not a message.
#[derive(Debug, thiserror::Error)]
#[error("malformed message: {0}")]
pub struct DecodeError(String);

/// Encodes a message as a msgpack map with field names.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Serialising plain structs into memory cannot fail: no map has non-string keys, no length is
    // unknown.
    rmp_serde::to_vec_named(message).expect("plain structs serialise")
}

/// Decodes a message.
///
/// # Errors
/// Anything that is not one well-formed message of the expected type within the caps.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    rmp_serde::from_slice(bytes).map_err(|e| DecodeError(e.to_string()))
}
