//! The call-back checks that a sidecar answers at its admin address, that the sidecar has the registered id
//! and epoch, and that the sidecar and its engine are ready.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::json;

use crate::fleet::instance::Instance;
use crate::fleet::load::Health;
use crate::fleet::models::Models;
use crate::fleet::registry::{Answer, CallBack};
use crate::openai::headers::call_headers;
use crate::state::app::App;
use crate::upstream::client::LegError;
use crate::upstream::tls::explained;

/// The body of a sidecar's answer to a call-back.
#[derive(Deserialize)]
struct Acknowledged {
    id: String,
    epoch: u64,
    #[serde(default)]
    ready: bool,
    #[serde(default)]
    reason: Option<String>,
}

/// The result of a call-back: the answer, and the models of the engine if the engine has listed them.
pub(crate) type CalledBack = (CallBack, Answer, Option<Models>);

/// Calls an instance back: first its sidecar, if it has one, and then its engine's `/health` and `/v1/models`.
pub(crate) async fn call_back(app: Arc<App>, call: CallBack) -> CalledBack {
    let proxy = app.registration.to_string();
    let body = json!({"proxy": proxy, "id": call.id, "epoch": call.epoch}).to_string();
    let Some(url) = &call.url else {
        let (answer, models) = engine_answer(&app, &call).await;
        return (call, answer, models);
    };
    let sent = app
        .client
        .post_json(url, body.into(), CALL_BACK_TIMEOUT)
        .await;
    let answer = match sent {
        Ok((status, body)) => judge(&call, status, &body),
        Err(e) => Answer::Silent(explained(&e.to_string())),
    };
    let (answer, models) = match answer {
        Answer::Confirmed { ready: true, .. } => engine_answer(&app, &call).await,
        other => (other, None),
    };
    (call, answer, models)
}

/// Asks the engine for its health and then, over the same connection, for its models. Both questions share one time
/// limit, because an answer of the engine is valid only for a limited time.
async fn engine_answer(app: &App, call: &CallBack) -> (Answer, Option<Models>) {
    let asked = Instant::now();
    let answer = health(app, call).await;
    let (true, Some(url)) = (answer == Answer::READY, &call.models) else {
        return (answer, None);
    };
    let rest = CALL_BACK_TIMEOUT.saturating_sub(asked.elapsed());
    (answer, models(app, url, rest).await)
}

/// Returns the models that the engine lists; `None` if the engine gives no list.
async fn models(app: &App, url: &str, limit: Duration) -> Option<Models> {
    let headers = call_headers(&app.config.access);
    let answer = app.client.get(url, headers, limit).await.ok()?;
    let is_list = answer.head.status.is_success();
    is_list.then(|| Models::read(&answer.held)).flatten()
}

/// Checks the engine's `/health`. A sidecar is ready as soon as the engine's workers have connected, which
/// can be minutes before the engine's HTTP server listens.
async fn health(app: &App, call: &CallBack) -> Answer {
    let asked = app
        .client
        .get(&call.health, HeaderMap::new(), CALL_BACK_TIMEOUT)
        .await;
    let health = match &asked {
        Ok(answer) if answer.head.status.is_success() => Health::Good,
        Ok(_) => Health::Dead,
        Err(_) => Health::Unknown,
    };
    let instances = app.instances();
    let is_meant = |i: &&Arc<Instance>| i.id == call.id && i.epoch == call.epoch;
    if let Some(instance) = instances.iter().find(is_meant) {
        instance.load.checked(Instant::now(), health);
    }
    let reason = match asked {
        Ok(answer) if answer.head.status.is_success() => {
            return Answer::READY;
        }
        Ok(answer) => format!("its engine's /health answers {}", answer.head.status),
        Err(LegError::Connect(e)) => format!("its engine cannot be reached: {}", explained(&e)),
        // A busy server may be late once, so the result of the previous call-back stays valid until it
        // expires.
        Err(e) => return Answer::Silent(format!("its engine's /health: {e}")),
    };
    Answer::Confirmed {
        ready: false,
        reason,
    }
}

/// Interprets a sidecar's answer to a call-back.
fn judge(call: &CallBack, status: StatusCode, body: &Bytes) -> Answer {
    if status == StatusCode::CONFLICT {
        return Answer::Stranger;
    }
    if status != StatusCode::OK {
        return Answer::Silent(format!("it answered {status}"));
    }
    match serde_json::from_slice::<Acknowledged>(body) {
        Ok(ack) if ack.id != call.id || ack.epoch != call.epoch => Answer::Stranger,
        Ok(ack) => Answer::Confirmed {
            ready: ack.ready,
            reason: ack
                .reason
                .unwrap_or_default()
                .chars()
                .take(MAX_REASON_CHARS)
                .collect(),
        },
        Err(e) => Answer::Silent(format!(
            "the answer is not the acknowledgement of a sidecar: {e}"
        )),
    }
}

/// Longest wait for an answer. A sidecar answers from memory, so a sidecar that needs more than this time
/// is also too slow to push KV.
const CALL_BACK_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest reason of a sidecar that `/instances` and the log show, in characters.
const MAX_REASON_CHARS: usize = 200;
