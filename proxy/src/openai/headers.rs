//! The headers that the proxy forwards.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::openai::keys::Access;

/// Returns the headers of a leg: the client's headers, the request's id and the engine key. Headers
/// that concern only the client's connection to this proxy are left out.
pub(crate) fn leg_headers(client: &HeaderMap, id: HeaderValue, access: &Access) -> HeaderMap {
    let mut headers = end_to_end(client);
    for name in [header::HOST, header::EXPECT, header::ACCEPT_ENCODING] {
        headers.remove(name);
    }
    if let Some(key) = engine_key(access) {
        headers.insert(header::AUTHORIZATION, key);
    } else if access.asks_clients() {
        // The client's key is for this proxy only, and engines must not learn the key.
        headers.remove(header::AUTHORIZATION);
    }
    headers.insert(header::CONTENT_TYPE, JSON);
    headers.insert(crate::openai::request_id::HEADER, id);
    headers
}

/// Returns the headers of a question that the proxy itself asks an engine: the engine key, if there is one.
pub(crate) fn call_headers(access: &Access) -> HeaderMap {
    let key = engine_key(access).map(|key| (header::AUTHORIZATION, key));
    key.into_iter().collect()
}

/// Returns the value of `Authorization` for engines; `None` without an engine key.
fn engine_key(access: &Access) -> Option<HeaderValue> {
    // The conversion cannot fail: keys are checked when they are read, and are printable ASCII.
    let key = access.key_for_engines()?;
    HeaderValue::try_from(format!("Bearer {key}")).ok()
}

/// Gives a leg the client's own content type, for a body that the proxy does not read.
pub(crate) fn keep_content_type(leg: &mut HeaderMap, client: &HeaderMap) {
    match client.get(header::CONTENT_TYPE) {
        Some(kind) => drop(leg.insert(header::CONTENT_TYPE, kind.clone())),
        None => drop(leg.remove(header::CONTENT_TYPE)),
    }
}

/// Returns the headers, without the headers that concern only one connection or the framing of the
/// body.
pub(crate) fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let mut kept = headers.clone();
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in HOP_BY_HOP.iter().chain(&named) {
        kept.remove(name);
    }
    kept
}

/// Returns true if the answer is a stream of server-sent events.
pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .is_some_and(|value| value.trim_start().starts_with("text/event-stream"))
}

/// Content type of every leg, independent of the client's content type.
pub(crate) const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// Headers that concern only one connection or the framing of the body.
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];
