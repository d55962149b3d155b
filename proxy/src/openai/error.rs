//! Errors in the format of OpenAI's API. An error is a complete answer, or an event in a stream.

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use serde_json::json;

use crate::openai::endpoint::Endpoint;

/// An error that a client sees.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    code: Code,
    message: String,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:ident;)*) => {
        /// The machine-readable reason of an error: its `code`, and a label of the metrics.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Code {
            $($(#[$doc])* $name,)*
        }

        impl Code {
            /// All codes, so that metrics have all label values from the start.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Returns the name in answers and metrics.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }

            /// Returns the HTTP status.
            pub fn status(self) -> StatusCode {
                match self {
                    $(Self::$name => StatusCode::$status,)*
                }
            }
        }
    };
}

codes! {
    /// No API key, or a wrong API key.
    InvalidApiKey = "invalid_api_key", UNAUTHORIZED;
    /// The client has no permission for this request.
    NotPermitted = "not_permitted", FORBIDDEN;
    /// No instance has this name.
    NoSuchInstance = "no_such_instance", NOT_FOUND;
    /// No mode has this name.
    NoSuchMode = "no_such_mode", NOT_FOUND;
    /// No instance serves a model of this name.
    NoSuchModel = "no_such_model", NOT_FOUND;
    /// The description of an instance cannot be used.
    InvalidInstance = "invalid_instance", BAD_REQUEST;
    /// The body is not a JSON object.
    InvalidJson = "invalid_json", BAD_REQUEST;
    /// The body contains transfer parameters, which only the proxy may set.
    TransferParams = "kv_transfer_params_not_allowed", BAD_REQUEST;
    /// The body is not declared as JSON. vLLM answers 400 here, not 415.
    UnsupportedMediaType = "unsupported_media_type", BAD_REQUEST;
    /// The body could not be read to its end.
    BodyUnreadable = "body_unreadable", BAD_REQUEST;
    /// The body is longer than permitted.
    BodyTooLarge = "body_too_large", PAYLOAD_TOO_LARGE;
    /// The body did not come in time.
    BodyTimeout = "body_timeout", REQUEST_TIMEOUT;
    /// No such path.
    NotFound = "not_found", NOT_FOUND;
    /// The path does not support this method.
    MethodNotAllowed = "method_not_allowed", METHOD_NOT_ALLOWED;
    /// Too many requests are in flight.
    TooManyRequests = "too_many_requests", TOO_MANY_REQUESTS;
    /// The body was the slowest upload when other bodies needed its memory.
    UploadDisplaced = "upload_displaced", TOO_MANY_REQUESTS;
    /// Every connection is busy with a request.
    TooManyConnections = "too_many_connections", TOO_MANY_REQUESTS;
    /// The proxy drains and accepts no new requests.
    Draining = "draining", SERVICE_UNAVAILABLE;
    /// The proxy stops and cannot wait for the request.
    ShuttingDown = "shutting_down", SERVICE_UNAVAILABLE;
    /// No decode instance has registered.
    NoDecode = "no_decode_instance", SERVICE_UNAVAILABLE;
    /// Decode instances have registered, but none is ready.
    NoneReady = "no_decode_instance_ready", SERVICE_UNAVAILABLE;
    /// No connection to the decode instance.
    DecodeUnreachable = "decode_unreachable", SERVICE_UNAVAILABLE;
    /// The decode instance refuses more work.
    DecodeBusy = "decode_busy", SERVICE_UNAVAILABLE;
    /// The connection to the decode instance ended before the answer was complete.
    DecodeDied = "decode_died", BAD_GATEWAY;
    /// The decode instance did not answer in time.
    DecodeTimeout = "decode_timeout", GATEWAY_TIMEOUT;
    /// The decode instance began its answer, and then sent no data for too long.
    DecodeSilent = "decode_silent", GATEWAY_TIMEOUT;
}

impl Code {
    /// Returns OpenAI's `type` of an error.
    fn kind(self) -> &'static str {
        match self.status() {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_server_error() => "upstream_error",
            _ => "invalid_request_error",
        }
    }

    /// Returns true if a repetition of the same request may succeed.
    fn is_retryable(self) -> bool {
        self.status() == StatusCode::TOO_MANY_REQUESTS || self.status().is_server_error()
    }
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
    /// Creates an error with a human-readable message.
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }

    /// Returns the code of the error.
    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// Turns the error into an answer.
    pub(crate) fn into_response(self) -> Response {
        let mut response = Response::new(Body::from(self.json()));
        *response.status_mut() = self.code.status();
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if self.code.is_retryable() {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }

    /// Turns the error into an event, for a stream that has already begun. The leading blank line ends
    /// the previous event if that event is incomplete. No `[DONE]` follows, because the answer is not
    /// complete.
    pub(crate) fn into_event(self, endpoint: Endpoint) -> Bytes {
        // Clients of the newer endpoints find events by their names.
        let name: &[u8] = match endpoint {
            Endpoint::Messages | Endpoint::Responses => b"event: error\n",
            _ => b"",
        };
        let mut event = [b"\n\n", name, b"data: "].concat();
        event.extend_from_slice(&match endpoint {
            Endpoint::Messages => self.messages_json(),
            Endpoint::Responses => self.responses_json(),
            _ => self.json(),
        });
        event.extend_from_slice(b"\n\n");
        event.into()
    }

    /// Returns the error as Anthropic's clients read it.
    fn messages_json(&self) -> Vec<u8> {
        let error = json!({"type": self.code.kind(), "message": self.message});
        // `type` comes first, as in the engine's own events.
        format!(r#"{{"type":"error","error":{error}}}"#).into_bytes()
    }

    /// Returns the error as clients of `/v1/responses` read it.
    fn responses_json(&self) -> Vec<u8> {
        let (code, message) = (self.code.as_str(), json!(self.message));
        format!(r#"{{"type":"error","code":"{code}","message":{message},"param":null,"sequence_number":0}}"#)
            .into_bytes()
    }

    fn json(&self) -> Vec<u8> {
        let envelope = Envelope {
            error: Fields {
                message: &self.message,
                kind: self.code.kind(),
                param: None,
                code: self.code.as_str(),
            },
        };
        // Strings always serialise, so this cannot panic.
        serde_json::to_vec(&envelope).expect("strings serialise")
    }
}

impl axum::response::IntoResponse for ApiError {
    fn into_response(self) -> Response {
        Self::into_response(self)
    }
}

/// Value of `Retry-After`, in seconds: about the time that a registration or a restart takes.
pub(crate) const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");
