//! Errors in the shape that OpenAI's clients read, as an answer or as an event inside a stream.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;

/// An error that a client sees.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: &'static str,
    message: String,
    retry_after: Option<Duration>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Fields<'a>,
}

#[derive(Serialize)]
struct Fields<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'a str,
    param: Option<&'a str>,
    code: &'a str,
}

impl ApiError {
    /// The request is wrong; a repeat would be too.
    pub fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            code,
            message,
        )
    }

    /// A wrong request with a status of its own.
    pub fn refused(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    /// Too much at once; a repeat may succeed.
    pub fn overloaded(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_error",
            "too_many_requests",
            message,
        )
        .retry_after(RETRY_AFTER)
    }

    /// Nobody can serve it now; a repeat may succeed.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable_error",
            code,
            message,
        )
        .retry_after(RETRY_AFTER)
    }

    /// An engine failed the request.
    pub fn bad_gateway(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "upstream_error", code, message).retry_after(RETRY_AFTER)
    }

    /// An engine did not answer in time.
    pub fn gateway_timeout(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "upstream_error", code, message)
            .retry_after(RETRY_AFTER)
    }

    fn new(
        status: StatusCode,
        kind: &'static str,
        code: &'static str,
        message: impl Into<String>,
    ) -> Self {
        Self {
            status,
            kind,
            code,
            message: message.into(),
            retry_after: None,
        }
    }

    fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The code that programs read, and the label in metrics.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// As an answer.
    pub fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs()));
        }
        response
    }

    /// As an event of a stream that had begun well. The blank line first ends an event that broke
    /// off in its middle; no `[DONE]` follows, because the answer is not complete.
    pub fn into_event(self) -> Bytes {
        let mut event = b"\n\ndata: ".to_vec();
        event.extend_from_slice(&self.json());
        event.extend_from_slice(b"\n\n");
        event.into()
    }

    fn json(&self) -> Vec<u8> {
        let envelope = Envelope {
            error: Fields {
                message: &self.message,
                kind: self.kind,
                param: None,
                code: self.code,
            },
        };
        // Strings always serialise.
        serde_json::to_vec(&envelope).expect("strings serialise")
    }
}

/// Registrations and restarts are matters of a second.
const RETRY_AFTER: Duration = Duration::from_secs(1);
