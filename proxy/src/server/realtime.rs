//! `/v1/realtime`: a WebSocket, whose bytes pass between the client and one decode instance until one of them ends it.
//!
//! The proxy does not read the messages. The task of the client's connection passes the bytes, so a session has the
//! place of its connection and the place of its request until it ends.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::response::Response;
use http::response::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use hyper::upgrade::{self, OnUpgrade};
use hyper_util::rt::TokioIo;
use protocol::RequestId;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};
use tokio::select;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::fleet::instance::Instance;
use crate::openai::endpoint::Endpoint;
use crate::openai::error::{ApiError, Code};
use crate::openai::fallback::Fallback;
use crate::openai::headers::{end_to_end, keep_content_type, leg_headers};
use crate::openai::keys::may_ask;
use crate::openai::origin::refuse_other_sites;
use crate::openai::passed::PassedOn;
use crate::openai::request_id;
use crate::request::context::RequestContext;
use crate::request::failure::Failure;
use crate::request::response_body;
use crate::request::route_plan::RoutePlan;
use crate::request::state::Event;
use crate::server::api::{admit, answered_or_rejected};
use crate::server::incoming::Connection;
use crate::state::app::App;
use crate::telemetry::labels::Leg;
use crate::telemetry::trace::Trace;
use crate::upstream::client::LegError;
use crate::upstream::upgrade::{EngineStream, Switch};

/// The session that continues on a connection after the answer to its request; empty for most connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct NextSession(Arc<Mutex<Option<Session>>>);

/// A WebSocket to which both sides have agreed.
#[derive(Debug)]
pub(crate) struct Session {
    client: OnUpgrade,
    engine: EngineStream,
    context: RequestContext,
    /// Longest time without data in either direction.
    silence: Duration,
    force_shutdown: CancellationToken,
}

/// The query of a session's path.
#[derive(Default, Deserialize)]
struct Asked {
    model: Option<String>,
}

/// Serves a request for a session.
pub(crate) async fn open(
    State(app): State<Arc<App>>,
    passed: &'static PassedOn,
    request: Request,
) -> Response {
    let id = request_id::assign(request.headers());
    let named = request_id::header_value(&id);
    let answered = accept(&app, passed, request, id).await;
    answered_or_rejected(&app, named, answered)
}

async fn accept(
    app: &Arc<App>,
    passed: &'static PassedOn,
    mut request: Request,
    id: RequestId,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    may_ask(&app.config.access, request.headers())?;
    refuse_other_sites(request.headers())?;
    let Some(protocol) = protocol(request.headers()) else {
        let text = format!(
            "{} is a WebSocket: a request needs the header Upgrade: websocket",
            passed.path
        );
        return Err(ApiError::new(Code::NotFound, text));
    };
    if app.draining.is_cancelled() {
        let text = "the proxy is shutting down";
        return Err(ApiError::new(Code::Draining, text));
    }
    let permit = admit(app)?;
    let asked = Query::<Asked>::try_from_uri(request.uri()).unwrap_or_default();
    let plan = RoutePlan::of_session(app, asked.0.model.filter(|name| !name.is_empty()));
    let pair = plan.route(app, &[])?;
    let named = request_id::header_value(&id);
    let mut headers = leg_headers(request.headers(), named, &app.config.access);
    keep_content_type(&mut headers, request.headers());
    headers.insert(header::UPGRADE, protocol.clone());
    let trace = app.spans.is_some().then(|| Trace::of(request.headers()));
    if let Some(trace) = &trace {
        trace.pass_on(&mut headers);
    }
    let endpoint = Endpoint::Passed(passed);
    let (context, _) =
        RequestContext::begin(app, permit, arrived, endpoint, id, (&pair, &plan), trace);
    let path = request.uri().path_and_query();
    let path = path.map_or(passed.path, |path| path.as_str());
    let agreed = agree(app, context, &plan, pair.decode, path, headers).await;
    let (context, head, engine) = match agreed {
        Ok(agreed) => agreed,
        Err(response) => return Ok(*response),
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = end_to_end(&head.headers);
    let own = response.headers_mut();
    own.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    own.insert(header::UPGRADE, protocol);
    own.insert(request_id::HEADER, request_id::header_value(&context.id));
    let session = Session {
        client: upgrade::on(&mut request),
        engine,
        context,
        silence: app.config.idle_timeout,
        force_shutdown: app.force_shutdown.clone(),
    };
    // Without a place for it, the session ends here, and the client finds its connection closed.
    if let Some(connection) = request.extensions().get::<Connection>() {
        connection.session.put(session);
    }
    Ok(response)
}

/// Asks decode instances for the session, one after the other, until one of them agrees.
///
/// # Errors
/// No instance agrees. The error is the answer to the client.
async fn agree(
    app: &App,
    mut context: RequestContext,
    plan: &RoutePlan,
    mut decode: Arc<Instance>,
    path: &str,
    headers: HeaderMap,
) -> Result<(RequestContext, Parts, EngineStream), Box<Response>> {
    let mut failed = Vec::new();
    loop {
        let sent = Instant::now();
        context.decode_sent(&decode, Err(Fallback::PassedOn), 0);
        decode.load.chosen(sent, app.config.breaker());
        let url = decode.http.join(path);
        let asked = app.client.switch(&url, headers.clone(), HANDSHAKE_TIMEOUT);
        let error = match asked.await {
            Ok(Switch::Agreed(head, engine)) => {
                decode.load.succeeded(sent.elapsed());
                context.first_byte(head.status, true);
                context.on(Event::FirstByte);
                return Ok((context, head, engine));
            }
            Ok(Switch::Refused(answer)) => {
                decode.load.succeeded(sent.elapsed());
                context.first_byte(answer.head.status, false);
                context.on(Event::FirstByte);
                context.answered(false);
                let response = response_body::whole(*answer, &context.id);
                return Err(Box::new(response));
            }
            Err(error) => error,
        };
        app.suspect(&decode.id);
        if !matches!(error, LegError::Faulty(_)) {
            decode.load.failed(Instant::now(), app.config.breaker());
        }
        app.metrics.leg_failed(Leg::Decode(error.failure()));
        warn!(id = %context.id, decode = decode.id, %error, "decode leg failed");
        failed.push(decode.id.clone());
        let attempts = u32::try_from(failed.len()).unwrap_or(u32::MAX);
        let may_retry = error.is_retryable() && attempts < app.config.decode_attempts;
        let other = may_retry.then(|| plan.route_decode(app, &failed).ok());
        let Some(other) = other.flatten() else {
            let failure = Failure::of(error);
            let (status, text) = failure.status_and_text();
            context.failed(status, text);
            context.on(Event::DecodeFailed { another: false });
            return Err(Box::new(failure.into_response(&context.id)));
        };
        decode = other.decode;
        context.on(Event::DecodeFailed { another: true });
    }
}

/// Returns the protocol for which a client asks, if it is a WebSocket.
fn protocol(headers: &HeaderMap) -> Option<HeaderValue> {
    let value = headers.get(header::UPGRADE)?;
    let is_websocket = value
        .to_str()
        .is_ok_and(|value| value.eq_ignore_ascii_case("websocket"));
    is_websocket.then(|| value.clone())
}

impl NextSession {
    fn put(&self, session: Session) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
    }

    /// Returns the session that continues on the connection; `None` if there is none.
    pub(crate) fn take(&self) -> Option<Session> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Session {
    /// Passes bytes in both directions until one side ends the session.
    ///
    /// # Cancel safety
    /// Dropping the future closes both connections.
    pub(crate) async fn run(self) {
        let Self {
            client,
            engine,
            mut context,
            silence,
            force_shutdown,
        } = self;
        // The connection broke before the client got the answer: the drop of the context says that the client has left.
        let Ok(client) = client.await else { return };
        let (from_client, to_client) = split(TokioIo::new(client));
        let (from_engine, to_engine) = split(engine);
        let heard = Notify::new();
        let answer = pass(from_engine, to_client, &heard);
        let question = pass(from_client, to_engine, &heard);
        let broken = select! {
            biased;
            () = force_shutdown.cancelled() => ApiError::new(Code::ShuttingDown, "the proxy is shutting down"),
            end = answer => match end {
                Ok(()) => return context.answered(false),
                Err(Broken::Write) => return,
                Err(Broken::Read(e)) => {
                    ApiError::new(Code::DecodeDied, format!("the decode instance broke off the session: {e}"))
                }
            },
            end = question => match end {
                Ok(()) => return context.answered(false),
                Err(Broken::Read(_)) => return,
                Err(Broken::Write) => {
                    ApiError::new(Code::DecodeDied, "the decode instance has closed the session")
                }
            },
            () = silent(&heard, silence) => {
                let limit = humantime::format_duration(silence);
                ApiError::new(Code::DecodeSilent, format!("the session was silent for {limit} (--idle-timeout)"))
            }
        };
        context.broke(&broken);
        context.on(Event::AnswerBroke);
    }
}

/// The end of a direction that did not end properly.
enum Broken {
    /// The sender's connection broke.
    Read(io::Error),
    /// The receiver's connection broke, or the receiver does not read.
    Write,
}

/// Passes bytes in one direction until the sender ends it.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    heard: &Notify,
) -> Result<(), Broken> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let count = from.read(&mut buffer).await.map_err(Broken::Read)?;
        if count == 0 {
            // The receiver gets the last bytes; whether it still listens does not matter.
            drop(to.shutdown().await);
            return Ok(());
        }
        heard.notify_one();
        to.write_all(&buffer[..count])
            .await
            .map_err(|_| Broken::Write)?;
    }
}

/// Returns when nothing was heard for `limit`.
async fn silent(heard: &Notify, limit: Duration) {
    while timeout(limit, heard.notified()).await.is_ok() {}
}

/// Longest wait for an engine's answer to the handshake, which needs no computation.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes that are passed on at once. A message of 100 ms of audio has about 4 KiB.
const BUFFER_BYTES: usize = 16 * 1024;
