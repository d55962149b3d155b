//! The heads of requests and responses.
//!
//! A request has nine numbers and a key of 150 bytes, padded with spaces:
//! `command, length, format, dtype, location, shape0..shape3, key`. A response has nine numbers:
//! `code, length, format, dtype, shape0..shape3, location`. All numbers are signed, have 32 bits, and are little-endian.

use crate::entry::{About, Key};

/// Bytes of a request's head.
pub const REQUEST_BYTES: usize = 9 * 4 + KEY_BYTES;
/// Bytes of a response's head.
pub const RESPONSE_BYTES: usize = 9 * 4;
const KEY_BYTES: usize = 150;

/// The command of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The value follows; there is no response.
    Put,
    /// The response has the value.
    Get,
    /// The response says whether there is a value.
    Exist,
    /// LMCache has a number for a list of all keys, but neither its server nor its client implements the command.
    List,
    /// The response says that the server lives.
    Health,
}

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The command.
    pub command: Command,
    /// Bytes of the value that follows; 0 except for [`Command::Put`].
    pub length: usize,
    /// The description of the value.
    pub about: About,
    /// The key without its padding.
    pub key: Key,
}

/// The head of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// True if there is a value, or the server is well.
    pub ok: bool,
    /// Bytes of the value that follows.
    pub length: usize,
    /// The description that came with the value in its PUT.
    pub about: About,
}

/// A head after which the beginning of the next request is not known, so that the connection must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The command is not known.
    #[error("unknown command {0}")]
    Command(i32),
    /// The length is negative.
    #[error("negative length {0}")]
    Length(i32),
}

impl Request {
    /// Reads a head.
    ///
    /// # Errors
    /// See [`HeadError`].
    pub fn read(head: &[u8; REQUEST_BYTES]) -> Result<Self, HeadError> {
        let [command, length, format, dtype, location, a, b, c, d] = numbers(head);
        let command = match command {
            1 => Command::Put,
            2 => Command::Get,
            3 => Command::Exist,
            4 => Command::List,
            5 => Command::Health,
            other => return Err(HeadError::Command(other)),
        };
        // Clients send a length with each command, but a value follows only after a PUT.
        let length = match command {
            Command::Put => usize::try_from(length).map_err(|_| HeadError::Length(length))?,
            _ => 0,
        };
        let key = head[9 * 4..].trim_ascii_end().to_vec();
        Ok(Self {
            command,
            length,
            about: About {
                format,
                dtype,
                location,
                shape: [a, b, c, d],
            },
            key,
        })
    }
}

impl Response {
    /// The response to a request without a value. LMCache's client reads the format and the element type of each
    /// response, even if there is no value, so both must be known numbers.
    pub fn without_value(ok: bool) -> Self {
        Self {
            ok,
            length: 0,
            about: About {
                format: KV_2LTD,
                dtype: FLOAT16,
                ..About::default()
            },
        }
    }

    /// Writes the head.
    pub fn write(&self) -> [u8; RESPONSE_BYTES] {
        let About {
            format,
            dtype,
            location,
            shape: [a, b, c, d],
        } = self.about;
        let code = if self.ok { 200 } else { 400 };
        let length = i32::try_from(self.length).expect("no value is longer than MAX_VALUE_BYTES");
        let mut head = [0; RESPONSE_BYTES];
        for (place, number) in head
            .chunks_exact_mut(4)
            .zip([code, length, format, dtype, a, b, c, d, location])
        {
            place.copy_from_slice(&number.to_le_bytes());
        }
        head
    }
}

fn numbers(head: &[u8; REQUEST_BYTES]) -> [i32; 9] {
    let mut numbers = [0; 9];
    for (number, bytes) in numbers.iter_mut().zip(head.chunks_exact(4)) {
        *number = i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    numbers
}

/// LMCache's number of its first memory format.
const KV_2LTD: i32 = 1;
/// LMCache's number of the element type float16.
const FLOAT16: i32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn head(numbers: [i32; 9], key: &[u8]) -> [u8; REQUEST_BYTES] {
        let mut head = [b' '; REQUEST_BYTES];
        for (place, number) in head.chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&number.to_le_bytes());
        }
        head[36..36 + key.len()].copy_from_slice(key);
        head
    }

    #[test]
    fn a_request_has_its_numbers_and_its_key_without_padding() {
        let request = Request::read(&head([1, 77, 5, 6, 2, 1, 2, 3, 4], b"m@1@0@ab@half")).unwrap();
        assert_eq!(request.command, Command::Put);
        assert_eq!(request.length, 77);
        assert_eq!(request.key, b"m@1@0@ab@half");
        let about = About {
            format: 5,
            dtype: 6,
            location: 2,
            shape: [1, 2, 3, 4],
        };
        assert_eq!(request.about, about);
        // The location is the fifth number of a request, and the last of a response.
        let response = Response {
            ok: true,
            length: 77,
            about,
        };
        let numbers = [200, 77, 5, 6, 1, 2, 3, 4, 2];
        assert_eq!(response.write()[..], numbers.map(i32::to_le_bytes).concat());
    }

    #[test]
    fn only_a_put_has_a_length() {
        let get = Request::read(&head([2, -5, 1, 2, 0, 0, 0, 0, 0], b"k")).unwrap();
        assert_eq!((get.command, get.length), (Command::Get, 0));
        let put = Request::read(&head([1, -5, 1, 2, 0, 0, 0, 0, 0], b"k"));
        assert_eq!(put, Err(HeadError::Length(-5)));
        let other = Request::read(&head([9, 0, 1, 2, 0, 0, 0, 0, 0], b"k"));
        assert_eq!(other, Err(HeadError::Command(9)));
    }

    #[test]
    fn a_full_key_has_no_padding() {
        let key = [b'k'; 150];
        let request = Request::read(&head([3, 0, 1, 2, 0, 0, 0, 0, 0], &key)).unwrap();
        assert_eq!(request.key, key);
    }
}
