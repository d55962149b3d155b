//! What an answer says of the transfer behind it, made what one plain engine says.
//!
//! The decode engine counts all tokens that were moved as cached. The client is told how many the prefill
//! engine had cached: the others were computed for it. What a connector says to its proxy
//! (`kv_transfer_params`) is not the client's.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http_body::Frame;
use memchr::{memmem, memrchr};
use serde::de::IgnoredAny;

use crate::state::in_flight::Progress;

/// The whole answer to a request whose KV was moved.
pub(crate) fn whole(text: Bytes, progress: &Progress) -> Bytes {
    plain(text, cached(progress))
}

/// The answer to such a request as it comes.
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
    /// A line that has begun: what is looked for may be cut by the end of a chunk.
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
            // hyper does not ask again once a body has ended.
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
    fn line(&mut self, end: usize) -> Frame<Bytes> {
        let text = self.begun.split_to(end).freeze();
        Frame::data(plain(text, cached(&self.progress)))
    }
}

/// As the prefill leg's answer says. `None` if it does not, or has not come: both engines answer at nearly
/// the same time where the answer is one token.
fn cached(progress: &Progress) -> Option<u64> {
    progress.prefill_end()?.cached_tokens
}

/// The text with this number of cached tokens, or null, and without transfer parameters.
fn plain(text: Bytes, cached: Option<u64>) -> Bytes {
    let cached = cached.map_or_else(|| "null".to_owned(), |cached| cached.to_string());
    let mut out = Vec::new();
    let mut done = 0;
    // Each is looked for again only when the one before has been passed: an event with many of them costs what it
    // weighs.
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

/// Where the number of cached tokens lies in the first details from here on.
fn cached_tokens(text: &[u8], from: usize) -> Option<std::ops::Range<usize>> {
    let details = value(text, DETAILS, from)?;
    let tokens = value(&text[details.clone()], CACHED, 0)?;
    Some(details.start + tokens.start..details.start + tokens.end)
}

/// Where the value of the first field of this name from here on lies, if it is not null. Text of the model cannot be
/// mistaken for it: inside a JSON string its quotes are escaped.
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

/// A longer line passes as it comes. Answers that are not streamed are one line of up to 4 MiB that is
/// held already.
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

    /// An engine that repeats a field in one long event does not stop the proxy: what has been looked at is not
    /// looked at again.
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
