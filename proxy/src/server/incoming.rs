//! Receives a request: the client's address, the body, the place of the request, and the answer if it gets none.

use std::net::IpAddr;
use std::time::Instant;

use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http::HeaderValue;
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::select;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout_at;

use crate::openai::error::{ApiError, Code};
use crate::openai::request_id;
use crate::server::session::NextSession;
use crate::state::app::App;

/// The connection on which a request has come. Each request has it as an extension.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    /// The client's address.
    pub peer: IpAddr,
    /// The place for a WebSocket, which continues on this connection after the answer.
    pub session: NextSession,
}

/// Returns the address of the client that has sent a request.
pub(crate) fn peer(extensions: &http::Extensions) -> Option<IpAddr> {
    extensions.get::<Connection>().map(|from| from.peer)
}

/// Reads a body of at most `limit` bytes. An upload may take long, but it may not pause for longer than
/// `--client-timeout`.
///
/// # Errors
/// The body is too long, breaks off, pauses, or loses its place to another body.
pub(crate) async fn read(
    app: &App,
    mut body: Body,
    limit: usize,
    from: Option<IpAddr>,
) -> Result<Bytes, ApiError> {
    let too_large = || {
        let text = format!("the request body is longer than {limit} bytes");
        ApiError::new(Code::BodyTooLarge, text)
    };
    // Check the announced length before reading: a body that is too large must not take another body's place.
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    let displaced = || {
        let text = "other requests needed the place of this body, which came slowest (--max-in-flight, \
                    --max-upload-bytes)";
        ApiError::new(Code::UploadDisplaced, text)
    };
    let upload = app
        .uploads
        .begin(Instant::now(), from)
        .map_err(|_| displaced())?;
    let silence = app.config.client_timeout;
    let mut whole = BytesMut::new();
    let mut deadline = Instant::now() + silence;
    // The deadline moves after each further KiB. If every byte moved the deadline, a client that sends single
    // bytes could hold a place for ever.
    let mut enough = DROP_BYTES;
    loop {
        let frame = select! {
            biased;
            () = upload.displaced() => return Err(displaced()),
            frame = timeout_at(deadline.into(), body.frame()) => frame,
        };
        let frame = frame.map_err(|_| {
            let text = format!(
                "the client sent no more of the request body for {silence:?}, after {} bytes (--client-timeout)",
                whole.len()
            );
            ApiError::new(Code::BodyTimeout, text)
        })?;
        let Some(frame) = frame else {
            return Ok(whole.freeze());
        };
        let frame = frame.map_err(|e| ApiError::new(Code::BodyUnreadable, e.to_string()))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if whole.len() + data.len() > limit {
            return Err(too_large());
        }
        upload
            .grow(Instant::now(), data.len())
            .map_err(|_| displaced())?;
        whole.extend_from_slice(&data);
        if whole.len() >= enough {
            enough = whole.len() + DROP_BYTES;
            deadline = Instant::now() + silence;
        }
    }
}

/// Reserves the place of one more request.
pub(crate) fn admit(app: &App) -> Result<OwnedSemaphorePermit, ApiError> {
    app.admit().ok_or_else(|| {
        let most = app.config.max_in_flight;
        ApiError::new(
            Code::TooManyRequests,
            format!("{most} requests are already in flight (--max-in-flight)"),
        )
    })
}

/// Converts the error of a request for which no leg was sent. Gives the response the id `named` if it has none.
pub(crate) fn answered_or_rejected(
    app: &App,
    named: HeaderValue,
    answered: Result<Response, ApiError>,
) -> Response {
    let mut response = answered.unwrap_or_else(|error| {
        app.metrics.rejected(error.code());
        tracing::info!(id = named.to_str().ok(), code = error.code().as_str(), %error, "rejected");
        error.into_response()
    });
    // If a leg was sent, the response already has an id, which may come from the request's body.
    response
        .headers_mut()
        .entry(request_id::HEADER)
        .or_insert(named);
    response
}

/// Bytes that a client has to send per `--client-timeout`. A slower client counts as silent.
const DROP_BYTES: usize = 1024;
