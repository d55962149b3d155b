//! The endpoints that change the proxy: instances, mode, conversations.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::fleet::instance::{Instance, Named, Source};
use crate::fleet::registry::Command;
use crate::openai::error::{ApiError, Code};
use crate::openai::keys;
use crate::openai::origin::require_json_if_any;
use crate::routing::mode::{Costs, Mode};
use crate::server::incoming;
use crate::state::app::App;

/// The query of `POST /mode/{mode}`.
#[derive(Deserialize)]
pub(crate) struct Of {
    /// The model whose mode changes; if absent, the mode of all models changes.
    #[serde(default)]
    model: Option<String>,
}

/// Serves `GET /mode`.
pub(crate) async fn mode(State(app): State<Arc<App>>) -> Json<Value> {
    let shown = |mode: Mode, costs: Costs| {
        json!({
            "mode": mode,
            "prefill_us_per_token": costs.prefill_us_per_token,
            "hand_over_us": costs.hand_over_us,
        })
    };
    let first = app.models.of(None);
    let mut all = shown(app.mode.get(), first.measured.costs());
    for model in app.models.served() {
        all["models"][&*model.name] = shown(model.mode.get(), model.measured.costs());
    }
    Json(all)
}

/// Serves `POST /mode/{mode}`.
pub(crate) async fn set_mode(
    State(app): State<Arc<App>>,
    Path(mode): Path<String>,
    Query(Of { model }): Query<Of>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    permit(&app, &request)?;
    let wanted: Mode = mode.parse().map_err(|e: crate::routing::mode::NoMode| {
        ApiError::new(Code::NoSuchMode, e.to_string())
    })?;
    let Some(name) = model else {
        let before = app.mode.get();
        app.mode.set(wanted);
        app.models.set_mode(wanted);
        tracing::info!(%before, mode = %wanted, "mode");
        return Ok(Json(json!({"mode": wanted})));
    };
    let Some(model) = app.models.named(&name) else {
        let text = format!("no instance serves a model {name:?}");
        return Err(ApiError::new(Code::NoSuchModel, text));
    };
    let before = model.mode.get();
    model.mode.set(wanted);
    tracing::info!(%before, mode = %wanted, model = %model.name, "mode");
    Ok(Json(json!({"mode": wanted, "model": model.name})))
}

/// Serves `GET /conversations`.
pub(crate) async fn conversations(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    permit(&app, &request)?;
    let all = app.prefix_index.conversations(Instant::now());
    Ok(Json(json!({"count": all.len(), "conversations": all})))
}

/// Serves `POST /conversations/clear`.
pub(crate) async fn clear(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    permit(&app, &request)?;
    Ok(Json(json!({"cleared": app.prefix_index.clear()})))
}

/// Serves `POST /instances`, which adds an instance.
pub(crate) async fn add(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    permit(&app, &request)?;
    let from = incoming::peer(request.extensions());
    let body = incoming::read(&app, request.into_body(), MAX_BODY_BYTES, from).await?;
    let instance = named(&body)?;
    let id = instance.id.clone();
    let refused = |error: String| ApiError::new(Code::InvalidInstance, error);
    app.config.access.check(instance.hosts()).map_err(refused)?;
    ask(&app, |answer| Command::Name(Box::new(instance), answer))
        .await?
        .map_err(refused)?;
    Ok((StatusCode::CREATED, Json(json!({"id": id}))).into_response())
}

/// Serves `DELETE /instances/{id}`.
pub(crate) async fn remove(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    permit(&app, &request)?;
    let was_there = ask(&app, |answer| Command::Remove(id.clone(), answer)).await?;
    known(was_there, &id)
}

/// Serves `POST /instances/{id}/drain`, which stops new requests to an instance.
pub(crate) async fn drain(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    permit(&app, &request)?;
    let is_there = ask(&app, |answer| Command::Drain(id.clone(), true, answer)).await?;
    known(is_there, &id)
}

/// Serves `POST /instances/{id}/resume`, which undoes a drain.
pub(crate) async fn resume(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    permit(&app, &request)?;
    let is_there = ask(&app, |answer| Command::Drain(id.clone(), false, answer)).await?;
    known(is_there, &id)
}

/// Parses the instance in the body of `POST /instances`.
fn named(body: &Bytes) -> Result<Instance, ApiError> {
    let named: Named = serde_json::from_slice(body)
        .map_err(|e| ApiError::new(Code::InvalidInstance, e.to_string()))?;
    Instance::named(&named, Source::Added)
        .map_err(|e| ApiError::new(Code::InvalidInstance, e.to_string()))
}

/// Returns the answer to a request about one instance: the instance's id, or an error if the proxy does not
/// know the instance.
fn known(known: bool, id: &str) -> Result<Json<Value>, ApiError> {
    if known {
        return Ok(Json(json!({"id": id})));
    }
    Err(ApiError::new(
        Code::NoSuchInstance,
        format!("there is no instance {id:?}"),
    ))
}

/// Sends a command to the registration task and waits for its answer.
async fn ask<T>(
    app: &App,
    command: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, ApiError> {
    let stopped = || ApiError::new(Code::ShuttingDown, "the proxy is shutting down");
    let (answer, answered) = oneshot::channel();
    let commands: &mpsc::Sender<Command> = &app.commands;
    commands
        .send(command(answer))
        .await
        .map_err(|_| stopped())?;
    answered.await.map_err(|_| stopped())
}

/// Checks that a request may change the proxy.
fn permit(app: &App, request: &Request) -> Result<(), ApiError> {
    let (headers, peer) = (request.headers(), incoming::peer(request.extensions()));
    let permitted = keys::may_change(&app.config.access, headers, peer)
        .and_then(|()| require_json_if_any(headers, request.body()));
    permitted.inspect_err(|error| refused(app, request, error, "change refused"))
}

/// Checks that a request may read the pages about instances and requests.
///
/// # Errors
/// Returns the errors of [`keys::may_read`].
pub(crate) fn permit_to_read(app: &App, request: &Request) -> Result<(), ApiError> {
    let (headers, peer) = (request.headers(), incoming::peer(request.extensions()));
    let permitted = keys::may_read(&app.config.access, headers, peer);
    permitted.inspect_err(|error| refused(app, request, error, "read refused"))
}

/// Counts and logs a refused request.
fn refused(app: &App, request: &Request, error: &ApiError, what: &str) {
    app.metrics.rejected(error.code());
    // The path is escaped, because a client could otherwise write its own lines into the log.
    let (method, path) = (request.method(), request.uri().path());
    tracing::warn!(%method, path = %path.escape_debug(), code = error.code().as_str(), %error, "{what}");
}

/// Largest body of `POST /instances`, in bytes: it describes one instance.
const MAX_BODY_BYTES: usize = 64 * 1024;
