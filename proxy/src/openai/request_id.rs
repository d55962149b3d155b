//! The id of a request: in both legs, both sidecars and all logs.

use http::{HeaderMap, HeaderValue};
use protocol::RequestId;
use uuid::{Builder, Uuid};

/// The header that carries it.
pub(crate) const HEADER: &str = "x-request-id";

/// The id of a new request: the client's own, made safe and unique, or a new one.
///
/// A client's id alone would not do: a client that repeats a request under the same id would have
/// two requests share slots.
pub(crate) fn assign(headers: &HeaderMap) -> RequestId {
    unique(header(headers).unwrap_or_default())
}

/// The id of a new request that its client calls by this name.
pub(crate) fn unique(name: &str) -> RequestId {
    let wanted: String = name
        .chars()
        .filter(is_plain)
        .take(MAX_CLIENT_CHARS)
        .collect();
    RequestId(if wanted.is_empty() {
        random().to_string()
    } else {
        format!("{wanted}-{:08x}", rand::random::<u32>())
    })
}

/// The name that the client has chosen, as vLLM reads it: the header's, or else the body's
/// `request_id`, given as JSON. `None` for
/// one that is long or has other characters than names of requests: connectors read addresses from
/// such ids, so that an engine could be made to talk to a stranger.
pub(crate) fn chosen(headers: &HeaderMap, field: Option<&str>) -> Option<RequestId> {
    let name = match headers.get(HEADER) {
        Some(_) => header(headers)?.to_owned(),
        None => serde_json::from_str::<String>(field?).ok()?,
    };
    let is_fit = (1..=MAX_CLIENT_CHARS).contains(&name.len()) && name.chars().all(|c| is_plain(&c));
    is_fit.then_some(RequestId(name))
}

fn header(headers: &HeaderMap) -> Option<&str> {
    headers.get(HEADER)?.to_str().ok()
}

fn is_plain(c: &char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// A UUID of this thread's random numbers: asking the kernel for each would be a system call a request.
pub(crate) fn random() -> Uuid {
    Builder::from_random_bytes(rand::random()).into_uuid()
}

/// The id as a header.
pub(crate) fn header_value(id: &RequestId) -> HeaderValue {
    // `unique` and `chosen` let only letters, digits, '-', '_' and '.' through.
    HeaderValue::from_str(&id.0).expect("request ids are plain ASCII")
}

/// The id is part of log lines, of engine-side ids and of every message about the request.
const MAX_CLIENT_CHARS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        let check = |given: &str, prefix: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(HEADER, HeaderValue::from_bytes(given.as_bytes()).unwrap());
            let id = assign(&headers).0;
            assert!(id.starts_with(prefix), "{given} became {id}");
            assert_eq!(id.len(), prefix.len() + 9, "{given} became {id}");
        };
        check("abc", "abc");
        check("a b/c\"d\\e", "abcde");
        check("../../etc", "....etc");
        check(&"x".repeat(500), &"x".repeat(64));
        let id = assign(&HeaderMap::new()).0;
        assert!(Uuid::parse_str(&id).is_ok());
        assert_ne!(id, assign(&HeaderMap::new()).0);
    }
}
