//! The body of an answer, which passes the decode engine's chunks on as they come.
//!
//! Chunks that are available at the same time go to the client in one write, because a write costs more than
//! copying a chunk.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame, SizeHint};
use protocol::RequestId;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::fleet::load::{DEAD_AFTER, DEAD_LOOK};
use crate::openai::error::{ApiError, Code};
use crate::openai::headers::{end_to_end, is_event_stream};
use crate::openai::sse::{self, Events};
use crate::openai::usage;
use crate::request::context::RequestContext;
use crate::request::state::Event;
use crate::upstream::client::Answer;
use crate::upstream::pool::LinkBody;

/// Limits on an engine's behaviour within an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Silence {
    /// Longest time without data.
    pub idle: Duration,
    /// Time limit for a dead engine: the answer ends if no data has come for this time, and the engine's
    /// `/health` has failed for at least this time.
    pub dead: Duration,
    /// Longest event of a stream, in bytes.
    pub max_event: usize,
}

/// The answer's body. The body owns the request's context: when hyper drops the body because the client has
/// left, the legs are dropped, too.
struct ResponseBody {
    held: Option<Bytes>,
    rest: Option<LinkBody>,
    /// Chunks that have come. The next write passes these chunks on together.
    gathered: BytesMut,
    context: RequestContext,
    idle: Pin<Box<Sleep>>,
    /// Time of the last data. The timer `idle` is reset only when the timer fires, because a reset at each
    /// chunk would cost more than the chunk.
    heard: Instant,
    limits: Silence,
    force_shutdown: Pin<Box<WaitForCancellationFutureOwned>>,
    stream: bool,
    events: Events,
    tail: Vec<u8>,
}

/// Converts a decode leg's answer into the response to the client.
pub(crate) fn respond(
    mut context: RequestContext,
    answer: Answer,
    limits: Silence,
    force_shutdown: CancellationToken,
) -> Response {
    let stream = is_event_stream(&answer.head.headers);
    context.first_byte(answer.head.status, stream);
    context.on(Event::FirstByte);
    let mut body = ResponseBody {
        held: Some(answer.held).filter(|held| !held.is_empty()),
        rest: answer.rest,
        gathered: BytesMut::new(),
        idle: Box::pin(sleep(limits.idle.min(limits.dead).min(DEAD_AFTER))),
        heard: Instant::now(),
        limits,
        force_shutdown: Box::pin(force_shutdown.cancelled_owned()),
        stream,
        events: Events::default(),
        tail: Vec::new(),
        context,
    };
    if body.held.is_none() && body.rest.is_none() {
        body.finish();
    }
    let mut response = Response::new(());
    *response.status_mut() = answer.head.status;
    *response.headers_mut() = end_to_end(&answer.head.headers);
    let id = crate::openai::request_id::header_value(&body.context.id);
    response
        .headers_mut()
        .insert(crate::openai::request_id::HEADER, id);
    response.map(|()| Body::new(body))
}

/// Converts an answer that has been read completely into the response to the client.
pub(crate) fn whole(answer: Answer, id: &RequestId) -> Response {
    let mut response = Response::new(Body::from(answer.held));
    *response.status_mut() = answer.head.status;
    *response.headers_mut() = end_to_end(&answer.head.headers);
    response.headers_mut().insert(
        crate::openai::request_id::HEADER,
        crate::openai::request_id::header_value(id),
    );
    response
}

impl ResponseBody {
    /// Ends the request after the last byte of the answer, and reads the usage from the tail.
    fn finish(&mut self) {
        self.rest = None;
        if let Some(usage) = usage::find(&self.tail) {
            self.context.counted(usage);
        }
        let ends_with_error = self.stream && sse::ends_with_error(&self.tail);
        self.context.answered(ends_with_error);
    }

    /// Ends the answer early. A stream ends with an error event. An answer that is not a stream is broken
    /// off, because a proper end would make the client believe that the document is complete.
    fn break_off(&mut self, error: ApiError) -> Poll<Option<Result<Frame<Bytes>, ApiError>>> {
        self.rest = None;
        if self.is_complete() {
            self.finish();
            return self.end();
        }
        self.context.broke(&error);
        self.context.on(Event::AnswerBroke);
        if self.stream {
            self.gathered
                .extend_from_slice(&error.into_event(self.context.endpoint()));
            return self.pass_on();
        }
        Poll::Ready(Some(Err(error)))
    }

    /// Returns true if the stream's last event has come, even if the body has not ended yet.
    fn is_complete(&self) -> bool {
        self.stream && sse::is_complete(&self.tail)
    }

    /// Gathers the chunks that are available, and passes them on.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ApiError>>> {
        while let Some(rest) = &mut self.rest {
            match Pin::new(rest).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    let Ok(chunk) = frame.into_data() else {
                        continue;
                    };
                    self.hear(&chunk);
                    if self.events.unended() > self.limits.max_event {
                        let text = format!(
                            "the decode instance sent {} bytes of one event without its end",
                            self.events.unended()
                        );
                        return self.break_off(ApiError::new(Code::DecodeDied, text));
                    }
                    self.gathered.extend_from_slice(&chunk);
                    if self.gathered.len() >= ENOUGH {
                        return self.pass_on();
                    }
                }
                Poll::Ready(None) => self.finish(),
                Poll::Ready(Some(Err(e))) => {
                    let text = format!("the decode instance broke off its answer: {e}");
                    return self.break_off(ApiError::new(Code::DecodeDied, text));
                }
                Poll::Pending if self.gathered.is_empty() => {
                    let text = ready!(self.poll_silence(cx));
                    return self.break_off(ApiError::new(Code::DecodeSilent, text));
                }
                Poll::Pending => return self.pass_on(),
            }
        }
        self.end()
    }

    /// Returns the chunks that are left at the end of the answer. When no chunk is left, returns the end of
    /// the body.
    fn end(&mut self) -> Poll<Option<Result<Frame<Bytes>, ApiError>>> {
        if self.gathered.is_empty() {
            return Poll::Ready(None);
        }
        self.pass_on()
    }

    /// Returns the gathered chunks as one frame.
    fn pass_on(&mut self) -> Poll<Option<Result<Frame<Bytes>, ApiError>>> {
        Poll::Ready(Some(Ok(Frame::data(self.gathered.split().freeze()))))
    }

    /// Becomes ready when the engine has been silent for too long. Returns the error text for the client.
    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<String> {
        let shown = |time| humantime::format_duration(time).to_string();
        loop {
            ready!(self.idle.as_mut().poll(cx));
            let (now, limits) = (Instant::now(), self.limits);
            let until = self.heard + limits.idle;
            if until <= now {
                let text = format!(
                    "the decode instance has been silent for {}",
                    shown(limits.idle)
                );
                return Poll::Ready(text);
            }
            // A working engine may be silent for long. But if the engine's `/health` also fails, the engine
            // is dead, and waiting is useless.
            if (self.context).is_decode_dead(now.into_std(), self.heard.into_std(), limits.dead) {
                let text = format!(
                    "the decode instance has been silent for {}, and its /health fails",
                    shown(Duration::from_secs(
                        now.duration_since(self.heard).as_secs()
                    ))
                );
                return Poll::Ready(text);
            }
            let look = (self.heard + DEAD_AFTER).max(now + DEAD_LOOK);
            self.idle.as_mut().reset(look.min(until));
        }
    }

    /// Notes that the engine works, and keeps the end of the chunk, which may contain the usage.
    fn hear(&mut self, chunk: &[u8]) {
        if !self.stream || self.events.hear(chunk) {
            self.heard = Instant::now();
            self.context.heard(self.heard.into_std());
        }
        self.keep_tail(chunk);
    }

    /// Appends a chunk to the tail, which keeps at least the last `most` bytes of the answer.
    fn keep_tail(&mut self, chunk: &[u8]) {
        let most = if self.stream {
            usage::STREAM_TAIL_BYTES
        } else {
            usage::TAIL_BYTES
        };
        if chunk.len() >= most {
            self.tail.clear();
            self.tail.extend_from_slice(&chunk[chunk.len() - most..]);
            return;
        }
        if self.stream && self.tail.capacity() == 0 {
            // Reserve all the memory that the tail ever needs, so that the memory of thousands of streams
            // does not grow for a minute.
            self.tail.reserve_exact(2 * most);
        }
        // Cut once per `most` bytes, because each cut moves the rest of the tail.
        if self.tail.len() + chunk.len() > 2 * most {
            self.tail.drain(..self.tail.len() - most);
        }
        self.tail.extend_from_slice(chunk);
    }
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = ApiError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ApiError>>> {
        let this = self.get_mut();
        if let Some(held) = this.held.take() {
            this.hear(&held);
            if this.rest.is_none() {
                // hyper does not poll again after it has got the announced number of bytes, so the request
                // must end now.
                this.finish();
            }
            if this.rest.is_none() || held.len() >= ENOUGH {
                return Poll::Ready(Some(Ok(Frame::data(held))));
            }
            this.gathered.extend_from_slice(&held);
        }
        if this.rest.is_none() {
            return this.end();
        }
        if this.force_shutdown.as_mut().poll(cx).is_ready() {
            let error = ApiError::new(Code::ShuttingDown, "the proxy is shutting down");
            return this.break_off(error);
        }
        this.poll_rest(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_none() && self.rest.is_none() && self.gathered.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.held, &self.rest) {
            _ if !self.gathered.is_empty() => SizeHint::default(),
            (Some(held), None) => SizeHint::with_exact(held.len() as u64),
            (None, None) => SizeHint::with_exact(0),
            _ => SizeHint::default(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // A client that leaves after the last event has got the whole answer, so the request's outcome is not
        // `client_left`.
        if self.is_complete() && self.rest.is_some() {
            self.finish();
        }
    }
}

/// Size from which gathered chunks are passed on, in bytes: larger writes are not cheaper.
const ENOUGH: usize = 16 * 1024;
