//! Hides a transfer in an answer: the client gets the same fields as from a single engine.
//!
//! The decode engine counts as cached all tokens whose KV was moved. The client gets the number of tokens
//! that the prefill engine had cached, because the other tokens were computed for this request. The client
//! does not get `kv_transfer_params`, which a connector addresses to its proxy.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use memchr::{memmem, memrchr};
use serde::de::IgnoredAny;

use crate::openai::endpoint::Endpoint;
use crate::openai::usage::Details;
use crate::state::in_flight::Progress;

/// Masks a whole answer to a request whose KV was moved.
pub(crate) fn whole(text: Bytes, endpoint: Endpoint, progress: &Progress) -> Bytes {
    plain(text, endpoint, told(progress))
}

/// Masks a streamed answer to a request whose KV was moved, chunk by chunk.
pub(crate) fn stream(body: Body, endpoint: Endpoint, progress: Arc<Progress>) -> Body {
    Body::new(Masked {
        body,
        endpoint,
        progress,
        begun: BytesMut::new(),
    })
}

struct Masked {
    body: Body,
    endpoint: Endpoint,
    progress: Arc<Progress>,
    /// A line that is not complete yet. Lines are masked as a whole, because a field may be split over two
    /// chunks.
    begun: BytesMut,
}

impl http_body::Body for Masked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        loop {
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None if this.begun.is_empty() => return Poll::Ready(None),
                None => return Poll::Ready(Some(Ok(this.line(this.begun.len())))),
            };
            let Ok(chunk) = frame.into_data() else {
                continue;
            };
            this.begun.extend_from_slice(&chunk);
            // hyper does not poll a body again after its end, so the rest must be passed on now.
            let is_last = this.body.is_end_stream() || this.begun.len() > MAX_LINE;
            let end = memrchr(b'\n', &this.begun).map_or(0, |at| at + 1);
            let end = if is_last { this.begun.len() } else { end };
            if end > 0 {
                return Poll::Ready(Some(Ok(this.line(end))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.begun.is_empty() && self.body.is_end_stream()
    }
}

impl Masked {
    /// Takes the first `end` bytes and returns them masked.
    fn line(&mut self, end: usize) -> Frame<Bytes> {
        let text = self.begun.split_to(end).freeze();
        Frame::data(plain(text, self.endpoint, told(&self.progress)))
    }
}

/// Returns the counts of the prefill leg's answer. A count is `None` if this answer does not contain the number, or has
/// not come yet. This answer comes so late if the decode leg generates only one token, because both engines then answer
/// at nearly the same time.
fn told(progress: &Progress) -> Details {
    let note = progress.prefill_end();
    Details {
        cached_tokens: note.as_ref().and_then(|note| note.cached_tokens),
        written_tokens: note.and_then(|note| note.written_tokens),
    }
}

/// Returns the text with the prefill engine's counts, and without transfer parameters.
fn plain(text: Bytes, endpoint: Endpoint, told: Details) -> Bytes {
    let mut out = Vec::new();
    let mut done = 0;
    // Search for a field again only when the loop has passed the position at which the field was last found,
    // so that an event with many of these fields does not take quadratic time.
    let mut counts = next_counts(&text, 0, endpoint, told);
    let mut params = value(&text, PARAMS, 0);
    loop {
        let is_params = match (counts.first(), &params) {
            (None, None) => break,
            (Some((counts, _)), Some(params)) => params.start < counts.start,
            (_, params) => params.is_some(),
        };
        let edits = match params.clone().filter(|_| is_params) {
            Some(params) => vec![(params, "null".to_owned())],
            None => std::mem::take(&mut counts),
        };
        let had_counts = !(is_params && counts.is_empty());
        for (found, with) in edits {
            out.extend_from_slice(&text[done..found.start]);
            out.extend_from_slice(with.as_bytes());
            done = found.end;
        }
        if had_counts && counts.first().is_none_or(|(counts, _)| counts.start < done) {
            counts = next_counts(&text, done, endpoint, told);
        }
        if params.as_ref().is_some_and(|params| params.start < done) {
            params = value(&text, PARAMS, done);
        }
    }
    if out.is_empty() {
        return text;
    }
    out.extend_from_slice(&text[done..]);
    out.into()
}

/// Texts that replace parts of a text, in the order of their positions.
type Edits = Vec<(Range<usize>, String)>;

/// Finds the edits of an object with token counts. The second argument is the prefill engine's counts.
type Find = fn(&[u8], Details) -> Edits;

/// Returns the edits of the first object with token counts after `from` that needs any; empty if no object does.
fn next_counts(text: &[u8], mut from: usize, endpoint: Endpoint, told: Details) -> Edits {
    let (key, edits): (_, Find) = match endpoint {
        Endpoint::Messages => (USAGE, counts_of_messages),
        Endpoint::Responses => (INPUT_DETAILS, counts_of_responses),
        Endpoint::Completions | Endpoint::Chat | Endpoint::Passed(_) => (DETAILS, counts_of_chats),
    };
    while let Some(object) = value(text, key, from) {
        let found = edits(&text[object.clone()], told);
        if !found.is_empty() {
            let moved = |at: Range<usize>| object.start + at.start..object.start + at.end;
            return found
                .into_iter()
                .map(|(at, with)| (moved(at), with))
                .collect();
        }
        from = object.end;
    }
    Vec::new()
}

/// Returns the edits of `prompt_tokens_details`. An unknown number is `null`, as at an engine that does not give it.
fn counts_of_chats(details: &[u8], told: Details) -> Edits {
    let shown = |tokens: Option<u64>| tokens.map_or_else(|| "null".to_owned(), |n| n.to_string());
    let edits = [
        (CACHED, shown(told.cached_tokens)),
        (CREATED, shown(told.written_tokens)),
    ];
    sorted(edits.map(|(key, with)| Some((value(details, key, 0)?, with))))
}

/// Returns the edits of `input_tokens_details` in a response, where no number may be `null`.
fn counts_of_responses(details: &[u8], told: Details) -> Edits {
    let cached = told.cached_tokens.unwrap_or_default().to_string();
    let written = told.written_tokens.unwrap_or_default().to_string();
    let turns = value(details, CACHED_PER_TURN, 0).filter(|at| details[at.clone()] != *b"[]");
    sorted([
        turns.map(|at| (at, format!("[{cached}]"))),
        value(details, CACHED, 0).map(|at| (at, cached)),
        value(details, WRITTEN, 0).map(|at| (at, written)),
    ])
}

/// Returns the edits of `usage` in an answer of `/v1/messages`. Its `input_tokens` contains neither the cached tokens
/// nor the tokens put into the cache, so the sum of the three stays the same.
fn counts_of_messages(usage: &[u8], told: Details) -> Edits {
    let number = |key| {
        let at = value(usage, key, 0)?;
        let number: u64 = std::str::from_utf8(&usage[at.clone()]).ok()?.parse().ok()?;
        Some((at, number))
    };
    let (Some((read_at, read)), Some((input_at, input))) = (number(CACHE_READ), number(INPUT))
    else {
        return Vec::new();
    };
    let creation = number(CACHE_CREATION);
    let all = input + read + creation.as_ref().map_or(0, |(_, tokens)| *tokens);
    let read = told.cached_tokens.unwrap_or_default().min(all);
    let mut rest = all - read;
    let created = creation.map(|(at, _)| {
        let written = told.written_tokens.unwrap_or_default().min(rest);
        rest -= written;
        (at, written.to_string())
    });
    sorted([
        created,
        Some((read_at, read.to_string())),
        Some((input_at, rest.to_string())),
    ])
}

/// Returns the edits that there are, in the order of their positions.
fn sorted<const N: usize>(edits: [Option<(Range<usize>, String)>; N]) -> Edits {
    let mut edits: Edits = edits.into_iter().flatten().collect();
    edits.sort_by_key(|(at, _)| at.start);
    edits
}

/// Returns the position of the first value of the field `key` after `from` that is not `null`. Text that the
/// model wrote cannot be mistaken for the field, because quotes inside a JSON string are escaped.
fn value(text: &[u8], key: &[u8], from: usize) -> Option<Range<usize>> {
    for at in memmem::find_iter(&text[from..], key) {
        let at = from + at;
        let rest = &text[at + key.len()..];
        let blank = rest
            .iter()
            .take_while(|byte| matches!(byte, b' ' | b':'))
            .count();
        let rest = &rest[blank..];
        if blank == 0 || rest.starts_with(b"null") {
            continue;
        }
        let mut values = serde_json::Deserializer::from_slice(rest).into_iter::<IgnoredAny>();
        if let Some(Ok(_)) = values.next() {
            let start = at + key.len() + blank;
            return Some(start..start + values.byte_offset());
        }
    }
    None
}

const DETAILS: &[u8] = b"\"prompt_tokens_details\"";
const CACHED: &[u8] = b"\"cached_tokens\"";
const CREATED: &[u8] = b"\"created_cache_tokens\"";
const WRITTEN: &[u8] = b"\"cache_write_tokens\"";
const CACHE_CREATION: &[u8] = b"\"cache_creation_input_tokens\"";
const INPUT_DETAILS: &[u8] = b"\"input_tokens_details\"";
const CACHED_PER_TURN: &[u8] = b"\"cached_tokens_per_turn\"";
const USAGE: &[u8] = b"\"usage\"";
const INPUT: &[u8] = b"\"input_tokens\"";
const CACHE_READ: &[u8] = b"\"cache_read_input_tokens\"";
const PARAMS: &[u8] = b"\"kv_transfer_params\"";

/// Maximum size of an incomplete line that is held back, in bytes. An answer that is not streamed is a single
/// line of up to 4 MiB, which is in memory already.
const MAX_LINE: usize = 4 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(cached: Option<u64>, written: Option<u64>) -> Details {
        Details {
            cached_tokens: cached,
            written_tokens: written,
        }
    }

    #[test]
    fn what_is_plain() {
        let check = |given: &'static str, cached, expect: &str| {
            let plain = plain(
                Bytes::from_static(given.as_bytes()),
                Endpoint::Chat,
                counts(cached, None),
            );
            assert_eq!(std::str::from_utf8(&plain).unwrap(), expect);
        };
        let given = r#"{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":8,"a":1}},"kv_transfer_params":{"a":[1]},"x":1}"#;
        let told = r#"{"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":3,"a":1}},"kv_transfer_params":null,"x":1}"#;
        check(given, Some(3), told);
        check(
            r#"{"prompt_tokens_details": {"cached_tokens": 8}}"#,
            None,
            r#"{"prompt_tokens_details": {"cached_tokens": null}}"#,
        );
        for same in [
            r#"{"text":"\"kv_transfer_params\":{} \"prompt_tokens_details\":{\"cached_tokens\":1}"}"#,
            r#"{"usage":{"prompt_tokens_details":null},"kv_transfer_params":null}"#,
            r#"{"top_logprobs":[{"\"cached_tokens\"":-1}],"x":"kv_transfer_params"}"#,
            "",
        ] {
            check(same, Some(3), same);
        }
    }

    #[test]
    fn the_newer_endpoints_have_other_counts() {
        let check = |endpoint, given: &'static str, cached, expect: &str| {
            let plain = plain(
                Bytes::from_static(given.as_bytes()),
                endpoint,
                counts(cached, Some(4)),
            );
            assert_eq!(std::str::from_utf8(&plain).unwrap(), expect);
        };
        let responses = r#"{"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":8,"cache_write_tokens":0,"cached_tokens_per_turn":[8]}},"kv_transfer_params":{}}"#;
        check(
            Endpoint::Responses,
            responses,
            Some(3),
            r#"{"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":3,"cache_write_tokens":4,"cached_tokens_per_turn":[3]}},"kv_transfer_params":null}"#,
        );
        check(
            Endpoint::Responses,
            r#"{"input_tokens_details":{"cached_tokens":8,"cached_tokens_per_turn":[]}}"#,
            None,
            r#"{"input_tokens_details":{"cached_tokens":0,"cached_tokens_per_turn":[]}}"#,
        );
        let messages =
            r#"{"usage":{"input_tokens":1,"output_tokens":2,"cache_read_input_tokens":8},"x":1}"#;
        check(
            Endpoint::Messages,
            messages,
            Some(3),
            r#"{"usage":{"input_tokens":6,"output_tokens":2,"cache_read_input_tokens":3},"x":1}"#,
        );
        check(
            Endpoint::Messages,
            r#"{"usage":{"cache_creation_input_tokens":0,"cache_read_input_tokens":8,"input_tokens":1}}"#,
            Some(3),
            r#"{"usage":{"cache_creation_input_tokens":4,"cache_read_input_tokens":3,"input_tokens":2}}"#,
        );
        let without = r#"{"usage":{"input_tokens":9,"output_tokens":2}}"#;
        check(Endpoint::Messages, without, Some(3), without);
    }

    /// An engine that repeats a field in one long event must not keep the proxy busy: no byte may be searched
    /// twice.
    #[test]
    fn the_work_grows_with_the_text() {
        let given = r#""kv_transfer_params":{},"#.repeat(MAX_LINE / 96);
        let told = r#""kv_transfer_params":null,"#.repeat(MAX_LINE / 96);
        let begun = std::time::Instant::now();
        let plain = plain(Bytes::from(given), Endpoint::Chat, counts(None, None));
        assert!(plain == told, "other text");
        let took = begun.elapsed();
        assert!(took < std::time::Duration::from_secs(15), "{took:?}");
    }
}
