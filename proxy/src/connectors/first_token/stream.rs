//! A streamed answer that begins before its decode leg has answered: the prefill instance provides the
//! first token.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, header};
use http_body::Frame;
use protocol::RequestId;

use crate::connectors::first_token::merge::Merger;
use crate::openai::headers::{JSON, is_event_stream};
use crate::openai::request_id;

/// The body of an answer that begins with the first token.
struct FirstTokenBody {
    merger: Merger,
    stage: Stage,
}

enum Stage {
    /// The first token has to be sent. The future is the decode leg, which has not been polled yet.
    Head(Pin<Box<dyn Future<Output = Response> + Send>>),
    /// The decode leg is in flight. Its future owns the request.
    Waiting(Pin<Box<dyn Future<Output = Response> + Send>>),
    /// The decode leg's events are passed on.
    Events(Body),
    /// The decode leg has answered with an error, which becomes one event. The bytes are the beginning of
    /// this event.
    Error(Body, Vec<u8>),
    /// The stream has ended.
    Over,
}

/// Returns a stream that begins with the first token and continues with the answer of `rest`.
pub(crate) fn respond(
    merger: Merger,
    id: &RequestId,
    rest: Pin<Box<dyn Future<Output = Response> + Send>>,
) -> Response {
    let body = FirstTokenBody {
        merger,
        stage: Stage::Head(rest),
    };
    with_headers(Body::new(body), EVENTS, id)
}

/// Returns the whole answer of a request whose first token is also its last token.
pub(crate) fn only(
    merger: &Merger,
    streams: bool,
    prompt_tokens: Option<u64>,
    id: &RequestId,
) -> Response {
    if streams {
        with_headers(Body::from(merger.only_head()), EVENTS, id)
    } else {
        with_headers(Body::from(merger.whole_head(prompt_tokens)), JSON, id)
    }
}

fn with_headers(body: Body, kind: HeaderValue, id: &RequestId) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(request_id::HEADER, request_id::header_value(id));
    response
}

impl http_body::Body for FirstTokenBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        loop {
            // The stage is `Over` while the loop processes the old stage. If the loop does not set a
            // new stage, the stream has ended.
            match std::mem::replace(&mut this.stage, Stage::Over) {
                // The client gets the first token before the decode leg is polled for the first time.
                Stage::Head(rest) => {
                    this.stage = Stage::Waiting(rest);
                    return Poll::Ready(Some(Ok(Frame::data(this.merger.head()))));
                }
                Stage::Waiting(mut rest) => match rest.as_mut().poll(cx) {
                    Poll::Ready(response) if is_event_stream(response.headers()) => {
                        this.stage = Stage::Events(response.into_body());
                    }
                    // The status is already sent, so an error can reach the client only as an event.
                    Poll::Ready(response) => {
                        this.stage = Stage::Error(response.into_body(), b"data: ".to_vec());
                    }
                    Poll::Pending => {
                        this.stage = Stage::Waiting(rest);
                        return Poll::Pending;
                    }
                },
                Stage::Events(mut body) => {
                    let polled = Pin::new(&mut body).poll_frame(cx);
                    if !matches!(polled, Poll::Ready(None)) {
                        this.stage = Stage::Events(body);
                    }
                    let frame = match ready!(polled) {
                        None => return Poll::Ready(None),
                        Some(Err(e)) => return Poll::Ready(Some(Err(e))),
                        Some(Ok(frame)) => frame,
                    };
                    let Some(chunk) = frame.data_ref() else {
                        continue;
                    };
                    // A chunk that completes no event gives no bytes, so the loop polls for the next
                    // chunk.
                    let converted = this.merger.chunk(chunk);
                    if !converted.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(converted))));
                    }
                }
                Stage::Error(mut body, mut event) => match Pin::new(&mut body).poll_frame(cx) {
                    Poll::Pending => {
                        this.stage = Stage::Error(body, event);
                        return Poll::Pending;
                    }
                    Poll::Ready(Some(Ok(frame))) => {
                        // A long error is cut, so that an engine cannot fill the proxy's memory.
                        let room = MAX_ERROR_BYTES.saturating_sub(event.len());
                        let data = frame.data_ref().map_or(&[][..], |data| data);
                        event.extend_from_slice(&data[..data.len().min(room)]);
                        this.stage = Stage::Error(body, event);
                    }
                    Poll::Ready(Some(Err(e))) => return Poll::Ready(Some(Err(e))),
                    Poll::Ready(None) => {
                        event.extend_from_slice(b"\n\n");
                        return Poll::Ready(Some(Ok(Frame::data(event.into()))));
                    }
                },
                Stage::Over => return Poll::Ready(None),
            }
        }
    }
}

/// Maximum number of bytes of an error that are passed on.
const MAX_ERROR_BYTES: usize = 1024 * 1024;

const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream; charset=utf-8");
