//! Opens `/v1/realtime`, a WebSocket between the client and one decode instance.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::response::Response;
use http::response::Parts;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use hyper::upgrade;
use protocol::RequestId;
use serde::Deserialize;
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
use crate::server::incoming::{Connection, admit, answered_or_rejected};
use crate::server::session::Session;
use crate::state::app::App;
use crate::telemetry::labels::Leg;
use crate::telemetry::trace::Trace;
use crate::upstream::client::LegError;
use crate::upstream::upgrade::{EngineStream, Switch, switch};

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

/// Checks a request, finds an instance that agrees to the session, and leaves the session for the connection's task.
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
        let asked = switch(app.client.pool(), &url, headers.clone(), HANDSHAKE_TIMEOUT);
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

/// Longest wait for an engine's answer to the handshake, which needs no computation.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
