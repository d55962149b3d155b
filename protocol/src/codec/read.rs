//! A serde deserializer for msgpack that has been scanned; it accepts each type in only one form.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};

use super::DecodeError;
use super::scan::{Head, head, skip};

/// Reads a `T` from a value that has been scanned.
pub(super) fn read<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, ReadError> {
    T::deserialize(&mut Reader { rest: bytes })
}

/// Error text for a field that is missing or malformed.
#[derive(Debug)]
pub(super) struct ReadError(String);

struct Reader<'de> {
    rest: &'de [u8],
}

impl<'de> Reader<'de> {
    fn head(&mut self) -> Result<Head<'de>, ReadError> {
        Ok(head(&mut self.rest)?)
    }

    fn text(&mut self, expected: &dyn de::Expected) -> Result<&'de str, ReadError> {
        match self.head()? {
            Head::Text(text) => plain(text),
            other => Err(other.unexpected(expected)),
        }
    }

    fn list<V: Visitor<'de>>(&mut self, left: u32, visitor: V) -> Result<V::Value, ReadError> {
        let mut elements = Elements { reader: self, left };
        let value = visitor.visit_seq(&mut elements)?;
        match elements.left {
            0 => Ok(value),
            _ => Err(ReadError("list is too long".to_owned())),
        }
    }

    fn map<V: Visitor<'de>>(&mut self, left: u32, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_map(Elements { reader: self, left })
    }
}

/// Checks that a text is UTF-8 without control characters, because logs and metrics show names and
/// texts unchanged.
fn plain(text: &[u8]) -> Result<&str, ReadError> {
    let text = std::str::from_utf8(text).map_err(|_| ReadError("text is not UTF-8".to_owned()))?;
    let control = if text.is_ascii() {
        // This code has no early exit, so that the compiler can check many bytes at once.
        text.bytes()
            .fold(false, |found, b| found | b.is_ascii_control())
    } else {
        text.chars().any(char::is_control)
    };
    if control {
        return Err(ReadError("text holds control characters".to_owned()));
    }
    Ok(text)
}

impl<'de> Deserializer<'de> for &mut Reader<'de> {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.head()? {
            Head::Nil => visitor.visit_unit(),
            Head::Bool(v) => visitor.visit_bool(v),
            Head::Unsigned(v) => visitor.visit_u64(v),
            Head::Signed(v) => visitor.visit_i64(v),
            Head::Float(v) => visitor.visit_f64(v),
            Head::Text(v) => visitor.visit_borrowed_str(plain(v)?),
            Head::Bytes(v) => visitor.visit_borrowed_bytes(v),
            Head::List(count) => self.list(count, visitor),
            Head::Map(count) => self.map(count, visitor),
            Head::Extension => Err(ReadError("an extension type".to_owned())),
        }
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let text = self.text(&visitor)?;
        visitor.visit_borrowed_str(text)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.head()? {
            Head::Bytes(bytes) => visitor.visit_borrowed_bytes(bytes),
            other => Err(other.unexpected(&visitor)),
        }
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_bytes(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let before = self.rest;
        match self.head()? {
            Head::Nil => visitor.visit_none(),
            _ => {
                self.rest = before;
                visitor.visit_some(self)
            }
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match self.head()? {
            Head::Map(count) => self.map(count, visitor),
            other => Err(other.unexpected(&visitor)),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        let name: StrDeserializer<'_, ReadError> = self.text(&visitor)?.into_deserializer();
        visitor.visit_enum(name)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        skip(&mut self.rest)?;
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char
        unit unit_struct seq tuple tuple_struct map
    }
}

/// Remaining elements of a list, or entries of a map.
struct Elements<'a, 'de> {
    reader: &'a mut Reader<'de>,
    left: u32,
}

impl<'de> SeqAccess<'de> for &mut Elements<'_, 'de> {
    type Error = ReadError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, ReadError> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        seed.deserialize(&mut *self.reader).map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        // The scan has checked that every element is present, so a false count cannot make this
        // process reserve too much memory.
        usize::try_from(self.left).ok()
    }
}

impl<'de> MapAccess<'de> for Elements<'_, 'de> {
    type Error = ReadError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, ReadError> {
        let Some(left) = self.left.checked_sub(1) else {
            return Ok(None);
        };
        self.left = left;
        seed.deserialize(&mut *self.reader).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ReadError> {
        seed.deserialize(&mut *self.reader)
    }
}

impl Head<'_> {
    fn unexpected(&self, expected: &dyn de::Expected) -> ReadError {
        let found = match *self {
            Head::Nil => Unexpected::Other("nil"),
            Head::Bool(v) => Unexpected::Bool(v),
            Head::Unsigned(v) => Unexpected::Unsigned(v),
            Head::Signed(v) => Unexpected::Signed(v),
            Head::Float(v) => Unexpected::Float(v),
            Head::Text(_) => Unexpected::Other("text"),
            Head::Bytes(_) => Unexpected::Other("bytes"),
            Head::Extension => Unexpected::Other("an extension type"),
            Head::List(_) => Unexpected::Seq,
            Head::Map(_) => Unexpected::Map,
        };
        de::Error::invalid_type(found, expected)
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        // Serde's message contains the refused value. A hostile text of 4 KB must not fill a log line.
        let mut text = message.to_string();
        if let Some((end, _)) = text.char_indices().nth(200) {
            text.truncate(end);
            text.push('…');
        }
        Self(text)
    }
}

impl From<DecodeError> for ReadError {
    fn from(error: DecodeError) -> Self {
        Self(error.to_string())
    }
}
