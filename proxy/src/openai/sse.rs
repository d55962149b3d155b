//! Finds data and the ends of events in the bytes of an event stream.
//!
//! Engines keep idle connections open with comments (vLLM's `--sse-keep-alive-interval`). A comment proves
//! only that the HTTP server lives, but data proves that the engine works.

use memchr::memchr_iter;

/// Finds the data and the events of a stream that comes in chunks. A chunk may end anywhere in an
/// event.
#[derive(Debug, Default)]
pub(crate) struct Events {
    line: Line,
    /// Bytes since the end of the last event.
    event: usize,
}

/// The kind of the line that is being received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// The line may be data: so far it has this many bytes, which are the beginning of `data:`.
    Maybe(usize),
    /// The line carries data.
    Data,
    /// The line is a comment, or a field that is not data.
    Other,
}

impl Default for Line {
    fn default() -> Self {
        Self::Maybe(0)
    }
}

impl Events {
    /// Reads the next chunk. Returns true if any part of the chunk is data.
    pub(crate) fn hear(&mut self, chunk: &[u8]) -> bool {
        let (mut is_data, mut from) = (false, 0);
        for end in memchr_iter(b'\n', chunk) {
            is_data |= self.go_on(&chunk[from..end]);
            self.end_line();
            from = end + 1;
        }
        is_data | self.go_on(&chunk[from..])
    }

    /// Returns the number of bytes since the end of the last complete event.
    pub(crate) fn unended(&self) -> usize {
        self.event
    }

    fn end_line(&mut self) {
        let is_blank = self.line == Line::default();
        self.event = if is_blank { 0 } else { self.event + 1 };
        self.line = Line::default();
    }

    fn go_on(&mut self, piece: &[u8]) -> bool {
        self.event += piece.len();
        // If lines end with CR LF, `piece` is a single CR for a blank line. If the CR counted as a field, the
        // end of the event would be missed.
        if let Line::Maybe(at) = self.line
            && !(piece.is_empty() || at == 0 && piece == b"\r")
        {
            let wanted = &DATA[at..];
            let both = wanted.len().min(piece.len());
            self.line = if piece[..both] != wanted[..both] {
                Line::Other
            } else if both == wanted.len() {
                Line::Data
            } else {
                Line::Maybe(at + both)
            };
        }
        self.line == Line::Data && !piece.is_empty()
    }
}

/// Collects a stream up to the end of its first event with data. Drops earlier events, which are mostly
/// comments. The client gets nothing before the event with data is complete, so that another instance can
/// still take over.
#[derive(Debug, Default)]
pub(crate) struct First {
    held: Vec<u8>,
    /// Number of bytes at the beginning of `held` that need no further search, because they contain no end of
    /// an event.
    searched: usize,
}

impl First {
    /// Adds the next chunk. When the event is complete, returns all bytes since the event's
    /// beginning.
    pub(crate) fn take(&mut self, chunk: &[u8]) -> Option<Vec<u8>> {
        self.held.extend_from_slice(chunk);
        loop {
            self.drop_comments();
            let Some(length) = end_of_event(&self.held, self.searched) else {
                self.searched = self.held.len();
                // An error is shorter than `MAX_FIRST_BYTES`. A longer event is passed on before its
                // end, so that memory stays bounded.
                let is_long = self.held.len() > MAX_FIRST_BYTES;
                return is_long.then(|| std::mem::take(&mut self.held));
            };
            if data(&self.held[..length]).is_some() {
                return Some(std::mem::take(&mut self.held));
            }
            self.held.drain(..length);
            self.searched = 0;
        }
    }

    fn drop_comments(&mut self) {
        let mut from = 0;
        while let Some(b':' | b'\n' | b'\r') = self.held.get(from) {
            let rest = &self.held[from..];
            let Some(end) = rest.iter().position(|byte| *byte == b'\n') else {
                // Keep the colon, so that the rest of the line also counts as a comment.
                self.held.truncate(from + 1);
                break;
            };
            from += end + 1;
        }
        if from > 0 {
            self.held.drain(..from);
            self.searched = 0;
        }
        self.searched = self.searched.min(self.held.len());
    }
}

/// Returns the length of the first event, including the blank line; `None` if the event is not complete. The
/// caller knows that the first bytes, up to the length `searched`, contain no end of an event. Lines end with
/// LF (vLLM) or with CR LF.
pub(crate) fn end_of_event(bytes: &[u8], searched: usize) -> Option<usize> {
    let from = searched.saturating_sub(2);
    let mut ends = memchr_iter(b'\n', bytes.get(from..)?).map(|at| from + at);
    ends.find_map(|at| match bytes[at + 1..] {
        [b'\n', ..] => Some(at + 2),
        [b'\r', b'\n', ..] => Some(at + 3),
        _ => None,
    })
}

/// Returns the first line of data in an event.
pub(crate) fn data(event: &[u8]) -> Option<&[u8]> {
    let mut lines = event.split(|byte| *byte == b'\n');
    lines.find_map(|line| line.strip_prefix(DATA).map(<[u8]>::trim_ascii))
}

/// Returns the error that an engine has sent instead of an event of the answer; `None` if the event is
/// not an error.
pub(crate) fn error(event: &[u8]) -> Option<&[u8]> {
    data(event).filter(|data| is_error(data))
}

/// Returns true if the stream's last event has come: `[DONE]`, or the last event of `/v1/messages`.
pub(crate) fn is_complete(tail: &[u8]) -> bool {
    let tail = tail.trim_ascii_end();
    let line = tail
        .rsplit(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    data(line).is_some_and(|data| data == b"[DONE]" || data.starts_with(MESSAGE_STOP))
}

/// Returns true if an error ended the stream: its last event before `[DONE]` is an error.
pub(crate) fn ends_with_error(tail: &[u8]) -> bool {
    let lines = tail.split(|byte| *byte == b'\n');
    let mut data = lines.filter_map(|line| line.strip_prefix(DATA).map(<[u8]>::trim_ascii));
    data.rfind(|data| *data != b"[DONE]").is_some_and(is_error)
}

fn is_error(data: &[u8]) -> bool {
    let inside = data.strip_prefix(b"{").map(<[u8]>::trim_ascii_start);
    let is_begin = |begin: &[u8]| inside.is_some_and(|inside| inside.starts_with(begin));
    // The second form is the form of `/v1/messages`.
    is_begin(b"\"error\"") || is_begin(b"\"type\":\"error\"")
}

const DATA: &[u8] = b"data:";

const MESSAGE_STOP: &[u8] = b"{\"type\":\"message_stop\"";

/// Maximum number of bytes to hold back. vLLM's first event is below 1 KiB unless the client asks for
/// the prompt's token ids.
const MAX_FIRST_BYTES: usize = 64 * 1024;

#[cfg(test)]
mod tests;
