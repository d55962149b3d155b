//! The results of legs: an answer, or the reason for which there is no answer.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header, response};
use serde::Deserialize;

use crate::connectors::answer::Prefilled;
use crate::openai::error::{ApiError, Code};
use crate::openai::fallback::Fallback;
use crate::openai::headers::JSON;
use crate::openai::sse;
use crate::upstream::pool::LinkBody;

/// An answer of an engine, of which at least the first bytes have come.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Status and headers, as the engine sent them.
    pub head: response::Parts,
    /// The part of the body that has been read.
    pub held: Bytes,
    /// The part of the body that has not been read; `None` if `held` is the whole body.
    pub rest: Option<LinkBody>,
}

/// The result of a prefill leg.
#[derive(Debug)]
pub(crate) enum PrefillEnd {
    /// The engine answered with a 2xx status.
    Answered(Prefilled),
    /// The engine answered that the request is wrong; this is its answer.
    Refused(Box<Answer>),
    /// The engine or the connection failed; the text says why.
    Failed(Fallback, String),
}

/// A leg that got no usable answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LegError {
    /// No connection could be opened in time: the engine has not seen the request.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The connection ended before the answer came.
    #[error("connection lost: {0}")]
    Died(String),
    /// The answer did not come in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The engine is too busy or is stopping; this is its answer.
    #[error("the engine answered {}", .0.head.status)]
    Busy(Box<Answer>),
    /// The engine answered that it has failed; this is its answer. The cause may be the engine or the
    /// request.
    #[error("the engine answered {}{}", .0.head.status, said(.0))]
    Faulty(Box<Answer>),
    /// The engine has shown no sign of work for this time, with this request or any other.
    #[error("no sign of work for {0:?}")]
    Silent(Duration),
}

/// The kind of a [`LegError`], for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LegFailure {
    /// [`LegError::Connect`]
    Connect,
    /// [`LegError::Died`]
    Died,
    /// [`LegError::Timeout`]
    Timeout,
    /// [`LegError::Busy`]
    Busy,
    /// [`LegError::Faulty`]
    Faulty,
    /// [`LegError::Silent`]
    Silent,
}

impl Answer {
    /// Returns the answer, unless its status says that another instance may have a better answer.
    ///
    /// # Errors
    /// The engine is busy, or has failed.
    pub(crate) fn judged(self) -> Result<Self, LegError> {
        match self.head.status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Err(LegError::Busy(Box::new(self)))
            }
            status if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT => {
                Err(LegError::Faulty(Box::new(self)))
            }
            _ => Ok(self),
        }
    }

    /// Creates the answer of a stream from its first event. vLLM sends the head of a stream before it
    /// knows that its engine is dead; an error in the first event then carries the real status. The
    /// result is then an error answer with the real status, so that another instance can take over.
    pub(crate) fn of_first_event(head: response::Parts, held: Bytes, rest: LinkBody) -> Self {
        let failed = sse::error(&held).and_then(|data| Some((status_in(data)?, data)));
        let Some((status, data)) = failed.filter(|_| head.status.is_success()) else {
            return Self {
                head,
                held,
                rest: Some(rest),
            };
        };
        let held = Bytes::copy_from_slice(data);
        let mut head = head;
        head.status = status;
        head.headers = HeaderMap::from_iter([(header::CONTENT_TYPE, JSON)]);
        Self {
            head,
            held,
            rest: None,
        }
    }
}

/// The part of an engine's error that holds the status.
#[derive(Deserialize)]
struct Said {
    error: Error,
}

#[derive(Deserialize)]
struct Error {
    #[serde(default)]
    code: serde_json::Value,
}

/// Returns the status in an engine's error if another instance may have a better answer; `None`
/// otherwise.
fn status_in(data: &[u8]) -> Option<StatusCode> {
    let said: Said = serde_json::from_slice(data).ok()?;
    let number = said
        .error
        .code
        .as_u64()
        .and_then(|code| u16::try_from(code).ok());
    match number.and_then(|code| StatusCode::from_u16(code).ok()) {
        Some(status @ (StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)) => {
            Some(status)
        }
        Some(status) if status.is_client_error() => None,
        Some(status) if status.is_server_error() => Some(status),
        _ => Some(StatusCode::INTERNAL_SERVER_ERROR),
    }
}

/// Returns the beginning of an engine's error, for logs.
fn said(answer: &Answer) -> String {
    let text = super::shown(&answer.held);
    if text.is_empty() {
        text
    } else {
        format!(": {text}")
    }
}

impl LegError {
    /// Returns the kind of the failure, without the details.
    pub(crate) fn failure(&self) -> LegFailure {
        match self {
            Self::Connect(_) => LegFailure::Connect,
            Self::Died(_) => LegFailure::Died,
            Self::Timeout(_) => LegFailure::Timeout,
            Self::Busy(_) => LegFailure::Busy,
            Self::Faulty(_) => LegFailure::Faulty,
            Self::Silent(_) => LegFailure::Silent,
        }
    }

    /// Returns true if a retry on another instance may succeed. After a timeout there is no retry,
    /// because the client's time is used up, too.
    pub(crate) fn is_retryable(&self) -> bool {
        !matches!(self, Self::Timeout(_))
    }
}

impl From<&LegError> for ApiError {
    fn from(error: &LegError) -> Self {
        let code = match error {
            LegError::Connect(_) => Code::DecodeUnreachable,
            LegError::Died(_) | LegError::Faulty(_) => Code::DecodeDied,
            LegError::Timeout(_) | LegError::Silent(_) => Code::DecodeTimeout,
            LegError::Busy(_) => Code::DecodeBusy,
        };
        Self::new(code, format!("no decode instance answered: {error}"))
    }
}
