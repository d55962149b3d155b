//! Walks a msgpack value without allocating and enforces the limits.

use super::{DecodeError, MAX_DEPTH, MAX_ELEMENTS, MAX_TEXT_BYTES};

/// Checks that `bytes` are exactly one map within the limits, and returns the text of its key
/// `type`.
pub(super) fn scan(bytes: &[u8]) -> Result<&str, DecodeError> {
    let mut rest = bytes;
    let Head::Map(entries) = head(&mut rest)? else {
        return Err(DecodeError::Malformed("not a map"));
    };
    let mut tag = None;
    let mut elements = 0;
    count(&mut elements, u64::from(entries) * 2, rest)?;
    for _ in 0..entries {
        let key = text(&mut rest)?.ok_or(DecodeError::Malformed("a key is not text"))?;
        if key == b"type" {
            let value = text(&mut rest)?.ok_or(DecodeError::Malformed("`type` is not text"))?;
            if tag.replace(value).is_some() {
                return Err(DecodeError::Malformed("two keys `type`"));
            }
        } else {
            walk(&mut rest, &mut elements)?;
        }
    }
    if !rest.is_empty() {
        return Err(DecodeError::Malformed("bytes after the message"));
    }
    let tag = tag.ok_or(DecodeError::Malformed("no key `type`"))?;
    std::str::from_utf8(tag).map_err(|_| DecodeError::Malformed("`type` is not UTF-8"))
}

/// First part of a value. For a scalar, the first part is the whole value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Head<'a> {
    Nil,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(&'a [u8]),
    Bytes(&'a [u8]),
    Extension,
    List(u32),
    Map(u32),
}

/// Reads the head of the next value. The head of a list or map contains only the number of its
/// elements or entries.
pub(super) fn head<'a>(rest: &mut &'a [u8]) -> Result<Head<'a>, DecodeError> {
    let marker = bytes::<1>(rest)?[0];
    Ok(match marker {
        0x00..=0x7f => Head::Unsigned(u64::from(marker)),
        0xe0..=0xff => Head::Signed(i64::from(marker.cast_signed())),
        0x80..=0x8f => Head::Map(u32::from(marker & 0x0f)),
        0x90..=0x9f => Head::List(u32::from(marker & 0x0f)),
        0xa0..=0xbf => Head::Text(take(rest, u32::from(marker & 0x1f))?),
        0xc0 => Head::Nil,
        0xc1 => return Err(DecodeError::Malformed("reserved marker")),
        0xc2 => Head::Bool(false),
        0xc3 => Head::Bool(true),
        0xc4..=0xc6 => {
            let len = length(rest, marker - 0xc4)?;
            Head::Bytes(take(rest, len)?)
        }
        0xc7..=0xc9 => {
            let len = length(rest, marker - 0xc7)?;
            bytes::<1>(rest)?;
            take(rest, len)?;
            Head::Extension
        }
        0xca => Head::Float(f64::from(f32::from_be_bytes(bytes(rest)?))),
        0xcb => Head::Float(f64::from_be_bytes(bytes(rest)?)),
        0xcc => Head::Unsigned(u64::from(bytes::<1>(rest)?[0])),
        0xcd => Head::Unsigned(u64::from(u16::from_be_bytes(bytes(rest)?))),
        0xce => Head::Unsigned(u64::from(u32::from_be_bytes(bytes(rest)?))),
        0xcf => Head::Unsigned(u64::from_be_bytes(bytes(rest)?)),
        0xd0 => Head::Signed(i64::from(bytes::<1>(rest)?[0].cast_signed())),
        0xd1 => Head::Signed(i64::from(i16::from_be_bytes(bytes(rest)?))),
        0xd2 => Head::Signed(i64::from(i32::from_be_bytes(bytes(rest)?))),
        0xd3 => Head::Signed(i64::from_be_bytes(bytes(rest)?)),
        0xd4..=0xd8 => {
            take(rest, 1 + (1 << (marker - 0xd4)))?;
            Head::Extension
        }
        0xd9..=0xdb => {
            let len = length(rest, marker - 0xd9)?;
            Head::Text(take(rest, len)?)
        }
        0xdc | 0xdd => Head::List(length(rest, marker - 0xdc + 1)?),
        0xde | 0xdf => Head::Map(length(rest, marker - 0xde + 1)?),
    })
}

/// Skips one value of a message that has been scanned.
pub(super) fn skip(rest: &mut &[u8]) -> Result<(), DecodeError> {
    walk(rest, &mut 0)
}

/// Walks one value that lies within the message's map.
fn walk(rest: &mut &[u8], elements: &mut usize) -> Result<(), DecodeError> {
    // Number of values that are still to come at each level of nesting.
    let mut open = [0u64; MAX_DEPTH];
    let mut depth = 0;
    loop {
        let inside = match head(rest)? {
            Head::Text(text) if text.len() > MAX_TEXT_BYTES => {
                return Err(DecodeError::Limit("text"));
            }
            Head::List(count) => u64::from(count),
            Head::Map(count) => u64::from(count) * 2,
            _ => 0,
        };
        if inside > 0 {
            count(elements, inside, rest)?;
            // The message's own map is the first level.
            if depth + 1 >= MAX_DEPTH {
                return Err(DecodeError::Limit("depth"));
            }
            open[depth] = inside;
            depth += 1;
            continue;
        }
        loop {
            let Some(level) = depth.checked_sub(1) else {
                return Ok(());
            };
            open[level] -= 1;
            if open[level] > 0 {
                break;
            }
            depth = level;
        }
    }
}

/// Adds the number of values that a list or map announces. Each value takes at least one byte, so a
/// number of values that exceeds the number of remaining bytes is refused before any work.
fn count(elements: &mut usize, announced: u64, rest: &[u8]) -> Result<(), DecodeError> {
    let announced = usize::try_from(announced).unwrap_or(usize::MAX);
    if announced > rest.len() {
        return Err(DecodeError::Malformed("truncated"));
    }
    *elements = elements.saturating_add(announced);
    if *elements > MAX_ELEMENTS {
        return Err(DecodeError::Limit("elements"));
    }
    Ok(())
}

/// Reads the next value and returns it if it is a text within the limit.
fn text<'a>(rest: &mut &'a [u8]) -> Result<Option<&'a [u8]>, DecodeError> {
    match head(rest)? {
        Head::Text(text) if text.len() > MAX_TEXT_BYTES => Err(DecodeError::Limit("text")),
        Head::Text(text) => Ok(Some(text)),
        _ => Ok(None),
    }
}

/// Reads a length of 1, 2 or 4 bytes.
fn length(rest: &mut &[u8], width: u8) -> Result<u32, DecodeError> {
    Ok(match width {
        0 => u32::from(bytes::<1>(rest)?[0]),
        1 => u32::from(u16::from_be_bytes(bytes(rest)?)),
        _ => u32::from_be_bytes(bytes(rest)?),
    })
}

fn take<'a>(rest: &mut &'a [u8], len: u32) -> Result<&'a [u8], DecodeError> {
    let (taken, left) = usize::try_from(len)
        .ok()
        .and_then(|len| rest.split_at_checked(len))
        .ok_or(DecodeError::Malformed("truncated"))?;
    *rest = left;
    Ok(taken)
}

fn bytes<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], DecodeError> {
    let (taken, left) = rest
        .split_first_chunk()
        .ok_or(DecodeError::Malformed("truncated"))?;
    *rest = left;
    Ok(*taken)
}
