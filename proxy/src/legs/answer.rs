//! What legs bring: an answer, or none.

use std::time::Duration;

use bytes::Bytes;
use http::response;

use crate::error::{ApiError, Code};
use crate::handover::Prefilled;
use crate::links::LinkBody;
use crate::route::Alone;

/// A decode leg's answer, from its first bytes on.
#[derive(Debug)]
pub struct Answer {
    /// Status and headers, as the engine sent them.
    pub head: response::Parts,
    /// What has been read of the body.
    pub held: Bytes,
    /// What has not; `None` if `held` is all.
    pub rest: Option<LinkBody>,
}

/// How a prefill leg ended.
#[derive(Debug)]
pub enum PrefillEnd {
    /// 2xx, and what it brings.
    Answered(Prefilled),
    /// The engine says that the request is wrong; this is its answer.
    Refused(Box<Answer>),
    /// The engine or the way to it failed.
    Failed(Alone, String),
}

/// A leg that brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum LegError {
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
}

impl LegError {
    /// How, without the details.
    pub fn failure(&self) -> LegFailure {
        match self {
            Self::Connect(_) => LegFailure::Connect,
            Self::Died(_) => LegFailure::Died,
            Self::Timeout(_) => LegFailure::Timeout,
            Self::Busy(_) => LegFailure::Busy,
        }
    }

    /// Another instance may do better. One that used up its time has used up the client's too.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, Self::Timeout(_))
    }
}

impl From<&LegError> for ApiError {
    fn from(error: &LegError) -> Self {
        let code = match error {
            LegError::Connect(_) => Code::DecodeUnreachable,
            LegError::Died(_) => Code::DecodeDied,
            LegError::Timeout(_) => Code::DecodeTimeout,
            LegError::Busy(_) => Code::DecodeBusy,
        };
        Self::new(code, format!("no decode instance answered: {error}"))
    }
}
