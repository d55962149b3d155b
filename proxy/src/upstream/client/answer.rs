//! What legs bring: an answer, or none.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header, response};
use serde::Deserialize;

use crate::connectors::handoff::Prefilled;
use crate::openai::error::{ApiError, Code};
use crate::openai::fallback::Fallback;
use crate::openai::headers::JSON;
use crate::openai::sse;
use crate::upstream::pool::LinkBody;

/// A decode leg's answer, from its first bytes on.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Status and headers, as the engine sent them.
    pub head: response::Parts,
    /// What has been read of the body.
    pub held: Bytes,
    /// What has not; `None` if `held` is all.
    pub rest: Option<LinkBody>,
}

/// How a prefill leg ended.
#[derive(Debug)]
pub(crate) enum PrefillEnd {
    /// 2xx, and what it brings.
    Answered(Prefilled),
    /// The engine says that the request is wrong; this is its answer.
    Refused(Box<Answer>),
    /// The engine or the way to it failed.
    Failed(Fallback, String),
}

/// A leg that brought no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LegError {
    /// Nobody listens there, or not in time: the engine has not seen the request.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The connection ended before an answer.
    #[error("connection lost: {0}")]
    Died(String),
    /// No answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The engine is too busy or stopping; this is its answer.
    #[error("the engine answered {}", .0.head.status)]
    Busy(Box<Answer>),
    /// The engine says that it has failed; this is its answer. The request may be at fault as well as
    /// the engine.
    #[error("the engine answered {}{}", .0.head.status, said(.0))]
    Faulty(Box<Answer>),
    /// The engine has shown no sign of work for so long, with this request or any other.
    #[error("no sign of work for {0:?}")]
    Silent(Duration),
}

/// How a leg brought no answer, for metrics.
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
    /// The answer, unless its status says that another instance may have a better one.
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

    /// What an engine means whose stream begins with an error. vLLM sends the head of a stream before
    /// it knows that its engine is dead: the status of the error then stands in the event.
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

/// An engine's error, as far as its status is in it.
#[derive(Deserialize)]
struct Said {
    error: Error,
}

#[derive(Deserialize)]
struct Error {
    #[serde(default)]
    code: serde_json::Value,
}

/// The status in an engine's error, if another instance may have a better answer.
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

/// The beginning of an engine's error, for logs.
fn said(answer: &Answer) -> String {
    let text = super::shown(&answer.held);
    if text.is_empty() {
        text
    } else {
        format!(": {text}")
    }
}

impl LegError {
    /// How, without the details.
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

    /// Another instance may do better. One that used up its time has used up the client's too.
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
