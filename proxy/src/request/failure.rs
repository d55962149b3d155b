//! What a client is told when no decode leg brings an answer.

use axum::response::Response;
use http::{StatusCode, header};
use protocol::RequestId;

use crate::openai::error::{ApiError, Code, RETRY_AFTER};
use crate::request::response_body;
use crate::upstream::client::{Answer, LegError};

/// An error, in an engine's own words or the proxy's.
#[derive(Debug)]
pub(crate) enum Failure {
    /// An engine's.
    Pass(Box<Answer>),
    /// The proxy's.
    Error(ApiError),
}

impl Failure {
    /// The proxy stops.
    pub(crate) fn shutting_down() -> Self {
        Self::Error(ApiError::new(
            Code::ShuttingDown,
            "the proxy is shutting down",
        ))
    }

    /// The last decode leg failed like this.
    pub(crate) fn of(error: LegError) -> Self {
        match error {
            LegError::Busy(answer) | LegError::Faulty(answer) if answer.rest.is_none() => {
                Self::Pass(answer)
            }
            error => Self::Error(ApiError::from(&error)),
        }
    }

    /// What the client is told, for the log.
    pub(crate) fn told(&self) -> (StatusCode, String) {
        match self {
            Self::Pass(answer) => {
                let status = answer.head.status;
                (
                    status,
                    format!("no decode engine does better than {status}"),
                )
            }
            Self::Error(error) => (error.code().status(), error.to_string()),
        }
    }

    /// The answer to the client.
    pub(crate) fn into_response(self, id: &RequestId) -> Response {
        match self {
            Self::Pass(answer) => {
                let mut response = response_body::whole(*answer, id);
                // An engine's failure may be the request's own: only a busy one is worth a repeat.
                if matches!(
                    response.status(),
                    StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
                ) {
                    let headers = response.headers_mut();
                    headers.entry(header::RETRY_AFTER).or_insert(RETRY_AFTER);
                }
                response
            }
            Self::Error(error) => error.into_response(),
        }
    }
}
