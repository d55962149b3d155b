//! The answer that a client gets when no decode leg succeeds.

use axum::response::Response;
use http::{StatusCode, header};
use protocol::RequestId;

use crate::openai::error::{ApiError, Code, RETRY_AFTER};
use crate::request::response_body;
use crate::upstream::client::{Answer, LegError};

/// An error for the client, from an engine or from the proxy.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The error answer of an engine, which the client gets unchanged.
    Pass(Box<Answer>),
    /// An error of the proxy.
    Error(ApiError),
}

impl Failure {
    /// Returns the error that the proxy is shutting down.
    pub(crate) fn shutting_down() -> Self {
        Self::Error(ApiError::new(
            Code::ShuttingDown,
            "the proxy is shutting down",
        ))
    }

    /// Returns the client's error for the failure of the last decode leg.
    pub(crate) fn of(error: LegError) -> Self {
        match error {
            LegError::Busy(answer) | LegError::Faulty(answer) if answer.rest.is_none() => {
                Self::Pass(answer)
            }
            error => Self::Error(ApiError::from(&error)),
        }
    }

    /// Returns the client's status, and a text for the log.
    pub(crate) fn status_and_text(&self) -> (StatusCode, String) {
        match self {
            Self::Pass(answer) => {
                let status = answer.head.status;
                (
                    status,
                    format!("no decode engine gave a better answer than {status}"),
                )
            }
            Self::Error(error) => (error.code().status(), error.to_string()),
        }
    }

    /// Converts the failure into the answer to the client.
    pub(crate) fn into_response(self, id: &RequestId) -> Response {
        match self {
            Self::Pass(answer) => {
                let mut response = response_body::whole(*answer, id);
                // The request itself may have caused the engine's failure, so the proxy suggests a retry only
                // if the engine is busy.
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
