//! Hides a transfer in an answer: the client gets the same fields as from a single engine.
//!
//! The decode engine counts as cached all tokens whose KV was moved. The client gets the number of tokens
//! that the prefill engine had cached, because the other tokens were computed for this request. The client
//! does not get `kv_transfer_params`, which a connector addresses to its proxy.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use memchr::{memmem, memrchr};
use serde::de::IgnoredAny;

use crate::state::in_flight::Progress;

/// Masks a whole answer to a request whose KV was moved.
pub(crate) fn whole(text: Bytes, progress: &Progress) -> Bytes {
    plain(text, cached(progress))
}

/// Masks a streamed answer to a request whose KV was moved, chunk by chunk.
pub(crate) fn stream(body: Body, progress: Arc<Progress>) -> Body {
    Body::new(Masked {
        body,
        progress,
        begun: BytesMut::new(),
    })
}

struct Masked {
    body: Body,
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
        Frame::data(plain(text, cached(&self.progress)))
    }
}

/// Returns the number of cached tokens from the prefill leg's answer. Returns `None` if this answer does not
/// contain the number, or has not come yet. This answer comes so late if the decode leg generates only one
/// token, because both engines then answer at nearly the same time.
fn cached(progress: &Progress) -> Option<u64> {
    progress.prefill_end()?.cached_tokens
}

/// Returns the text with this number of cached tokens (`null` if `None`) and without transfer parameters.
fn plain(text: Bytes, cached: Option<u64>) -> Bytes {
    let cached = cached.map_or_else(|| "null".to_owned(), |cached| cached.to_string());
    let mut out = Vec::new();
    let mut done = 0;
    // Search for a field again only when the loop has passed the position at which the field was last found,
    // so that an event with many of these fields does not take quadratic time.
    let mut tokens = cached_tokens(&text, 0);
    let mut params = value(&text, PARAMS, 0);
    loop {
        let is_params = match (&tokens, &params) {
            (None, None) => break,
            (Some(tokens), Some(params)) => params.start < tokens.start,
            (_, params) => params.is_some(),
        };
        let found = if is_params { &params } else { &tokens };
        let Some(found) = found.clone() else { break };
        let with: &str = if is_params { "null" } else { &cached };
        out.extend_from_slice(&text[done..found.start]);
        out.extend_from_slice(with.as_bytes());
        done = found.end;
        if tokens.as_ref().is_some_and(|tokens| tokens.start < done) {
            tokens = cached_tokens(&text, done);
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

/// Returns the position of the number of cached tokens in the first `prompt_tokens_details` after `from`.
fn cached_tokens(text: &[u8], from: usize) -> Option<std::ops::Range<usize>> {
    let details = value(text, DETAILS, from)?;
    let tokens = value(&text[details.clone()], CACHED, 0)?;
    Some(details.start + tokens.start..details.start + tokens.end)
}

/// Returns the position of the first value of the field `key` after `from` that is not `null`. Text that the
/// model wrote cannot be mistaken for the field, because quotes inside a JSON string are escaped.
fn value(text: &[u8], key: &[u8], from: usize) -> Option<std::ops::Range<usize>> {
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
const PARAMS: &[u8] = b"\"kv_transfer_params\"";

/// Maximum size of an incomplete line that is held back, in bytes. An answer that is not streamed is a single
/// line of up to 4 MiB, which is in memory already.
const MAX_LINE: usize = 4 * 1024 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_plain() {
        let check = |given: &'static str, cached, expect: &str| {
            let plain = plain(Bytes::from_static(given.as_bytes()), cached);
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

    /// An engine that repeats a field in one long event must not keep the proxy busy: no byte may be searched
    /// twice.
    #[test]
    fn the_work_grows_with_the_text() {
        let given = r#""kv_transfer_params":{},"#.repeat(MAX_LINE / 96);
        let told = r#""kv_transfer_params":null,"#.repeat(MAX_LINE / 96);
        let begun = std::time::Instant::now();
        let plain = plain(Bytes::from(given), None);
        assert!(plain == told, "other text");
        let took = begun.elapsed();
        assert!(took < std::time::Duration::from_secs(5), "{took:?}");
    }
}
