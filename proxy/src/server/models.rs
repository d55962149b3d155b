//! `GET /v1/models`: the models of all decode instances.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use http::HeaderMap;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokio::task::JoinSet;

use crate::fleet::instance::Instance;
use crate::openai::error::ApiError;
use crate::openai::headers::leg_headers;
use crate::openai::keys::may_ask;
use crate::openai::request_id;
use crate::request::response_body;
use crate::routing::NoRoute;
use crate::state::app::App;
use crate::upstream::client::{Answer, LegError};

/// Serves `GET /v1/models`. If all decode instances serve the same models, the answer is the answer of one of them.
/// Otherwise the proxy asks one instance for each list of models, and answers with the union.
pub(crate) async fn list(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if let Err(error) = may_ask(&app.config.access, &headers) {
        return error.into_response();
    }
    let id = request_id::assign(&headers);
    let groups = match groups(&app) {
        Ok(groups) => groups,
        Err(error) => return ApiError::from(error).into_response(),
    };
    let headers = leg_headers(&headers, request_id::header_value(&id), &app.config.access);
    let mut asked = JoinSet::new();
    for (at, group) in groups.into_iter().enumerate() {
        let (app, headers) = (Arc::clone(&app), headers.clone());
        asked.spawn(async move { (at, of_group(&app, &group, &headers).await) });
    }
    let mut all = asked.join_all().await;
    all.sort_by_key(|(at, _)| *at);
    let mut answers = Vec::new();
    let mut failed = None;
    for (_, answer) in all {
        match answer {
            Ok(answer) => answers.push(answer),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    match (union(answers), failed) {
        (Some(answer), _) => response_body::whole(answer, &id),
        (None, Some(error)) => ApiError::from(&error).into_response(),
        (None, None) => ApiError::from(NoRoute::NoDecode).into_response(),
    }
}

/// Returns the ready decode instances, in groups that serve the same models.
fn groups(app: &App) -> Result<Vec<Vec<Arc<Instance>>>, NoRoute> {
    let instances = app.instances();
    let mut groups: Vec<Vec<Arc<Instance>>> = Vec::new();
    for instance in instances.iter().filter(|i| i.is_ready() && i.decodes()) {
        match groups
            .iter_mut()
            .find(|group| group[0].models == instance.models)
        {
            Some(group) => group.push(Arc::clone(instance)),
            None => groups.push(vec![Arc::clone(instance)]),
        }
    }
    if !groups.is_empty() {
        return Ok(groups);
    }
    match instances.iter().filter(|i| i.decodes()).count() {
        0 => Err(NoRoute::NoDecode),
        registered => Err(NoRoute::NoneReady(registered)),
    }
}

/// Returns the answer of the first instance of the group that answers. Asks at most [`MAX_ASKED`] instances.
async fn of_group(
    app: &App,
    group: &[Arc<Instance>],
    headers: &HeaderMap,
) -> Result<Answer, LegError> {
    let mut result = Err(LegError::Timeout(MODELS_TIMEOUT));
    for instance in group.iter().take(MAX_ASKED) {
        let url = instance.http.join("/v1/models");
        result = app.client.get(&url, headers.clone(), MODELS_TIMEOUT).await;
        if result.is_ok() {
            break;
        }
        app.suspect(&instance.id);
    }
    result
}

/// Returns the first answer, with the models of the other answers added. An answer that is no list adds nothing, and
/// comes first only if there is no other answer.
fn union(mut answers: Vec<Answer>) -> Option<Answer> {
    if answers.len() < 2 {
        return answers.pop();
    }
    // The sort keeps the order of the instances otherwise.
    answers.sort_by_key(|answer| !answer.head.status.is_success());
    let lists: Vec<List<'_>> = answers
        .iter()
        .filter(|answer| answer.head.status.is_success())
        .filter_map(|answer| serde_json::from_slice(&answer.held).ok())
        .collect();
    let mut seen: Vec<String> = Vec::new();
    let mut data = Vec::new();
    for card in lists.iter().flat_map(|list| &list.data) {
        let id = serde_json::from_str::<Card>(card.get()).map(|card| card.id.to_string());
        if let Ok(id) = id
            && !seen.contains(&id)
        {
            seen.push(id);
            data.push(card.get());
        }
    }
    let body = format!(r#"{{"object":"list","data":[{}]}}"#, data.join(","));
    drop(lists);
    let mut first = answers.swap_remove(0);
    if !seen.is_empty() {
        first.held = body.into();
    }
    Some(first)
}

/// An engine's list of models.
#[derive(Deserialize)]
struct List<'a> {
    #[serde(borrow)]
    data: Vec<&'a RawValue>,
}

/// The part of an entry that tells models apart.
#[derive(Deserialize)]
struct Card {
    id: Value,
}

/// Longest wait for the list of models, which needs no computation.
const MODELS_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum number of instances of a group that are asked one after the other.
const MAX_ASKED: usize = 2;
