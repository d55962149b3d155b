//! The HTTP endpoints.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, delete, get, on, post};
use axum::{Json, Router};
use bytes::Bytes;
use http::{StatusCode, header};
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::fleet::instance::Instance;
use crate::membership::registration::unfit;
use crate::openai::endpoint::Endpoint;
use crate::openai::error::{ApiError, Code};
use crate::openai::keys::may_ask;
use crate::openai::origin::{refuse_other_sites, require_json};
use crate::openai::passed::{Methods, PASSED_ON, PassedOn};
use crate::openai::request_id;
use crate::request::{self, Arrival};
use crate::server::incoming::{admit, answered_or_rejected, peer, read};
use crate::server::{admin, models, realtime};
use crate::state::app::App;
use crate::telemetry::record::Record;

/// Returns the router with all endpoints of one proxy.
pub(crate) fn router(app: Arc<App>) -> Router {
    let routes = routes(app);
    let inner = routes.clone();
    routes.fallback(move |request: Request| decoded(inner, request))
}

fn routes(app: Arc<App>) -> Router {
    let passed = PASSED_ON.iter().fold(Router::new(), |router, passed| {
        router.route(passed.path, pass_on(passed))
    });
    passed
        .route(
            Endpoint::Completions.path(),
            post(|app, request| complete(app, Endpoint::Completions, request)),
        )
        .route(
            Endpoint::Chat.path(),
            post(|app, request| complete(app, Endpoint::Chat, request)),
        )
        .route(
            Endpoint::Messages.path(),
            post(|app, request| complete(app, Endpoint::Messages, request)),
        )
        .route(
            Endpoint::Responses.path(),
            post(|app, request| complete(app, Endpoint::Responses, request)),
        )
        .route("/v1/models", get(models::list))
        .route("/health", get(health))
        .route("/healthcheck", get(healthcheck))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/instances", get(instances).post(admin::add))
        .route("/instances/{id}", delete(admin::remove))
        .route("/instances/{id}/drain", post(admin::drain))
        .route("/instances/{id}/resume", post(admin::resume))
        .route("/mode", get(admin::mode))
        .route("/mode/{mode}", post(admin::set_mode))
        .route("/conversations", get(admin::conversations))
        .route("/conversations/clear", post(admin::clear))
        .route("/requests", get(requests))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .with_state(app)
}

/// Returns the handler of an endpoint whose requests are passed on.
fn pass_on(passed: &'static PassedOn) -> MethodRouter<Arc<App>> {
    let methods = match passed.methods {
        Methods::Get => MethodFilter::GET,
        Methods::Post => MethodFilter::POST,
        Methods::GetPost => MethodFilter::GET.or(MethodFilter::POST),
        Methods::GetDelete => MethodFilter::GET.or(MethodFilter::DELETE),
    };
    if passed.is_session() {
        return on(methods, move |app, request| {
            realtime::open(app, passed, request)
        });
    }
    on(methods, move |app, request| {
        complete(app, Endpoint::Passed(passed), request)
    })
}

/// Serves a request for an endpoint of the engines. Each response carries the request's id.
async fn complete(State(app): State<Arc<App>>, endpoint: Endpoint, request: Request) -> Response {
    let at = Instant::now();
    let (head, body) = request.into_parts();
    let id = request_id::assign(&head.headers);
    let named = request_id::header_value(&id);
    let peer = peer(&head.extensions);
    let path = match endpoint {
        Endpoint::Passed(_) => Cow::Owned(
            head.uri
                .path_and_query()
                .map_or("", |p| p.as_str())
                .to_owned(),
        ),
        _ => Cow::Borrowed(endpoint.path()),
    };
    // The proxy knows nothing of the body yet.
    let arrival = Arrival {
        at,
        endpoint,
        method: head.method,
        path,
        id,
        headers: head.headers,
        body: Bytes::new(),
    };
    let answered = accept(&app, arrival, body, peer).await;
    answered_or_rejected(&app, named, answered)
}

/// Checks and reads a request, reserves its place, and serves it.
async fn accept(
    app: &Arc<App>,
    mut arrival: Arrival,
    body: Body,
    peer: Option<IpAddr>,
) -> Result<Response, ApiError> {
    if !arrival.endpoint.is_probe() {
        may_ask(&app.config.access, &arrival.headers)?;
    }
    if arrival.endpoint.generates() {
        require_json(&arrival.headers)?;
    } else {
        refuse_other_sites(&arrival.headers)?;
    }
    let draining = || ApiError::new(Code::Draining, "the proxy is shutting down");
    if app.draining.is_cancelled() {
        return Err(draining());
    }
    arrival.body = read(app, body, app.config.max_body_bytes, peer).await?;
    if app.draining.is_cancelled() {
        return Err(draining());
    }
    // Reserve the place only after the body is complete, so that bodies that stop half-way hold no places
    // of requests.
    let permit = admit(app)?;
    request::serve(app, permit, arrival).await
}

/// Serves `GET /health`, the liveness probe: succeeds as long as the process answers.
async fn health() -> Json<Value> {
    Json(json!({"status": "ok", "version": env!("CARGO_PKG_VERSION")}))
}

/// Serves `GET /healthcheck` in the form of vLLM's example proxies.
async fn healthcheck(State(app): State<Arc<App>>) -> Json<Value> {
    let (prefill, decode) = ready_instances(&app);
    Json(json!({"status": "ok", "prefill_instances": prefill, "decode_instances": decode}))
}

/// Returns the number of ready prefill instances, and the number of ready decode instances.
fn ready_instances(app: &App) -> (usize, usize) {
    let instances = app.instances();
    let count = |takes: fn(&crate::fleet::instance::Instance) -> bool| {
        instances
            .iter()
            .filter(|i| i.is_ready() && takes(i))
            .count()
    };
    (count(|i| i.prefills()), count(|i| i.decodes()))
}

/// Serves `GET /ready`, the readiness probe: succeeds if a request would be served.
async fn ready(State(app): State<Arc<App>>) -> Response {
    let (prefill, decode) = ready_instances(&app);
    let mut reasons = Vec::new();
    if app.draining.is_cancelled() {
        reasons.push("draining");
    }
    if decode == 0 {
        reasons.push("no decode instance is ready");
    }
    let status = if reasons.is_empty() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = json!({
        "ready": reasons.is_empty(),
        "reasons": reasons,
        "prefill_instances": prefill,
        "decode_instances": decode,
    });
    (status, Json(body)).into_response()
}

/// Serves `GET /metrics`.
async fn metrics(State(app): State<Arc<App>>) -> Response {
    app.metrics.show_uploads(app.uploads.len());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    (
        [(header::CONTENT_TYPE, kind)],
        app.metrics.text(&app.instances(), &app.models.all()),
    )
        .into_response()
}

/// Serves `GET /instances`.
async fn instances(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Vec<Value>>, ApiError> {
    admin::permit_to_read(&app, &request)?;
    Ok(Json(shown(&app, &app.instances())))
}

/// Returns the instances as JSON. Each instance has the reasons why no KV moves to or from it.
fn shown(app: &App, instances: &[Arc<Instance>]) -> Vec<Value> {
    let now = Instant::now();
    let one = |instance: &Arc<Instance>| {
        let mut shown = serde_json::to_value(&**instance).unwrap_or_default();
        let unfit = unfit(instance, instances);
        if !unfit.is_empty() {
            shown["unfit"] = json!(unfit);
        }
        if let Some(blocks) = app.kv_index.shown(&instance.id) {
            shown["kv_events"] = json!(blocks);
        }
        let refuses = app.refusals.by(now, instance);
        if !refuses.is_empty() {
            shown["refuses"] = json!(refuses);
        }
        shown
    };
    instances.iter().map(one).collect()
}

/// Serves `GET /requests`.
async fn requests(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Vec<Record>>, ApiError> {
    admin::permit_to_read(&app, &request)?;
    Ok(Json(app.recent.all()))
}

/// Serves a path that matches no endpoint: decodes its percent escapes and tries again, as vLLM's server
/// does.
async fn decoded(routes: Router, mut request: Request) -> Response {
    let uri = request.uri().clone();
    let path = percent_decode_str(uri.path()).decode_utf8_lossy();
    let query = uri.query().map(|query| format!("?{query}"));
    let target = format!("{path}{}", query.unwrap_or_default());
    if path == uri.path() || path.contains(['?', '#']) {
        return not_found(request).await;
    }
    let Ok(target) = target.parse() else {
        return not_found(request).await;
    };
    *request.uri_mut() = target;
    routes.oneshot(request).await.into_response()
}

/// Answers a request for an unknown path: a redirect if only a slash at the end is wrong, otherwise 404.
async fn not_found(request: Request) -> Response {
    let uri = request.uri();
    if let Some(path) = uri.path().strip_suffix('/')
        && (OPENAI.contains(&path)
            || PASSED_ON
                .iter()
                .any(|passed| passed.is_at(path) && !passed.is_session()))
    {
        let query = uri.query().map(|query| format!("?{query}"));
        let there = format!("{path}{}", query.unwrap_or_default());
        return (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, there)]).into_response();
    }
    let text = format!("this proxy has no endpoint {}", request.uri().path());
    ApiError::new(Code::NotFound, text).into_response()
}

/// Answers a request whose method the path does not support.
async fn wrong_method(request: Request) -> Response {
    let text = format!(
        "{} does not take {}",
        request.uri().path(),
        request.method()
    );
    ApiError::new(Code::MethodNotAllowed, text).into_response()
}

/// Paths to which engines redirect a request for the same path with a slash at its end.
const OPENAI: [&str; 6] = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/responses",
    "/v1/models",
    "/health",
];
