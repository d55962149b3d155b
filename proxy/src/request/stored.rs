//! Finds the instance that holds a stored response, and gives new responses ids that the proxy knows.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use tokio::task::JoinSet;

use crate::fleet::instance::Instance;
use crate::openai::body::{BadBody, RequestBody};
use crate::openai::endpoint::Endpoint;
use crate::openai::request_id::random;
use crate::state::app::App;

/// Returns the id of the stored response that a request names, in its path or its body. Returns `None` if the
/// request names none, or if the id has characters that engines never give.
pub(crate) fn named_by(endpoint: Endpoint, path: &str, body: &RequestBody) -> Option<String> {
    let id = match endpoint {
        Endpoint::Responses => serde_json::from_str(body.previous_response()?).ok()?,
        Endpoint::Passed(passed) if passed.is_of_stored() => {
            let rest = path.strip_prefix(Endpoint::Responses.path())?;
            let rest = rest.strip_prefix('/')?;
            rest.split(['/', '?']).next()?.to_owned()
        }
        _ => return None,
    };
    Some(id).filter(|id: &String| is_plain(id))
}

/// Returns the decode instance that holds a response: from the proxy's memory or, if another proxy has
/// served the response, by asking all decode instances. Returns `None` if no instance has the response.
pub(crate) async fn holder(app: &App, id: &str, headers: &HeaderMap) -> Option<Arc<Instance>> {
    let instances = app.instances();
    if let Some(holder) = app.stored_responses.holder(id) {
        return instances.iter().find(|i| i.id == holder).cloned();
    }
    let decodes = instances.iter().filter(|i| i.is_ready() && i.decodes());
    let decodes: Vec<_> = decodes.cloned().collect();
    // A single instance answers best itself.
    if decodes.len() < 2 {
        return None;
    }
    let mut asked = JoinSet::new();
    for instance in decodes {
        let url = format!("{}/{id}", Endpoint::Responses.path());
        let (client, url, headers) = (
            app.client.clone(),
            instance.http.join(&url),
            headers.clone(),
        );
        asked.spawn(async move {
            let asked = client.decode(Method::GET, &url, headers, Bytes::new(), ASK_TIMEOUT);
            let answer = asked.await.ok()?;
            answer.head.status.is_success().then_some(instance)
        });
    }
    // The first instance that has the response is the only one. Dropping the set ends the other questions.
    while let Some(answer) = asked.join_next().await {
        if let Ok(Some(instance)) = answer {
            app.stored_responses.remember(id, &instance.id);
            return Some(instance);
        }
    }
    None
}

/// Returns the id under which an engine may store the response to this request; `None` if it stores none. A
/// client rarely chooses the id. Then the proxy adds one to the body, in vLLM's form, so that it knows the id
/// before the answer.
///
/// # Errors
/// Does not happen: the body was a JSON object before.
pub(crate) fn stored_as(
    endpoint: Endpoint,
    body: &mut RequestBody,
) -> Result<Option<String>, BadBody> {
    if endpoint != Endpoint::Responses || !body.may_be_stored() {
        return Ok(None);
    }
    if let Some(given) = body.json("request_id") {
        let id: Option<String> = serde_json::from_str(given).ok();
        return Ok(id.filter(|id| is_plain(id)));
    }
    let id = format!("resp_{:016x}", random().as_u64_pair().0);
    *body = body.named(&id)?;
    Ok(Some(id))
}

fn is_plain(id: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=MAX_CHARS).contains(&id.len()) && id.chars().all(is_plain)
}

/// Maximum length of a response's id. vLLM's own ids have 21 characters.
const MAX_CHARS: usize = 128;

/// Longest wait for an instance's answer whether it holds a response. No computation is necessary.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
