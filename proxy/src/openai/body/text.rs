//! Conversion of bodies that vLLM accepts through Python's `json.loads`: any Unicode encoding, and
//! numbers that JSON does not have.

use bytes::Bytes;

/// Returns the text in UTF-8, without a byte order mark; `None` if the bytes are not valid in the
/// encoding that they seem to have.
pub(super) fn utf8(source: Bytes) -> Option<Bytes> {
    let first = |at: usize| source.get(at).copied().unwrap_or_default();
    let (first, second) = (first(0), first(1));
    match source.as_ref() {
        [0xEF, 0xBB, 0xBF, ..] => Some(source.slice(3..)),
        [0, 0, 0xFE, 0xFF, rest @ ..] => wide(rest, u32::from_be_bytes),
        [0xFF, 0xFE, 0, 0, rest @ ..] => wide(rest, u32::from_le_bytes),
        [0xFE, 0xFF, rest @ ..] => double(rest, u16::from_be_bytes),
        [0xFF, 0xFE, rest @ ..] => double(rest, u16::from_le_bytes),
        // The first two characters of a JSON text are ASCII. The positions of zero bytes therefore show
        // the encoding.
        all @ [_, _, third, fourth, ..] => match (first, second, third | fourth) {
            (0, 0, _) => wide(all, u32::from_be_bytes),
            (0, _, _) => double(all, u16::from_be_bytes),
            (_, 0, 0) => wide(all, u32::from_le_bytes),
            (_, 0, _) => double(all, u16::from_le_bytes),
            _ => Some(source),
        },
        _ => Some(source),
    }
}

/// Returns the text with numbers of the same length instead of `NaN` and `Infinity`; `None` if the text
/// has neither.
pub(super) fn masked(source: &[u8]) -> Option<Vec<u8>> {
    let mut masked = source.to_vec();
    let (mut at, mut is_string, mut found) = (0, false, false);
    while at < source.len() {
        match source[at] {
            // A character after a backslash does not end the string.
            b'\\' if is_string => at += 1,
            b'"' => is_string = !is_string,
            _ if is_string => {}
            _ => {
                let number = NUMBERS
                    .iter()
                    .find(|(word, _)| source[at..].starts_with(word));
                if let Some((word, number)) = number {
                    masked[at..at + word.len()].copy_from_slice(number);
                    at += word.len() - 1;
                    found = true;
                }
            }
        }
        at += 1;
    }
    found.then_some(masked)
}

fn double(text: &[u8], unit: fn([u8; 2]) -> u16) -> Option<Bytes> {
    let (units, []) = text.as_chunks::<2>() else {
        return None;
    };
    let text = char::decode_utf16(units.iter().map(|bytes| unit(*bytes)));
    Some(text.collect::<Result<String, _>>().ok()?.into())
}

fn wide(text: &[u8], unit: fn([u8; 4]) -> u32) -> Option<Bytes> {
    let (units, []) = text.as_chunks::<4>() else {
        return None;
    };
    let text = units.iter().map(|bytes| char::from_u32(unit(*bytes)));
    Some(text.collect::<Option<String>>()?.into())
}

/// Words that Python reads as numbers, with JSON numbers of the same length.
const NUMBERS: [(&[u8], &[u8]); 2] = [(b"NaN", b"0.0"), (b"Infinity", b"0.000000")];
