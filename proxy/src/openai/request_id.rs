//! The id of a request. Both legs, both sidecars and all logs use this id.

use http::{HeaderMap, HeaderValue};
use protocol::RequestId;
use uuid::{Builder, Uuid};

/// The header that carries the id.
pub(crate) const HEADER: &str = "x-request-id";

/// Returns the id of a new request: the client's own id, made safe and unique, or a new id.
///
/// The client's id alone is not enough: two requests with the same id would share slots.
pub(crate) fn assign(headers: &HeaderMap) -> RequestId {
    unique(header(headers).unwrap_or_default())
}

/// Returns a unique id for a new request, made from the id `name` that its client has chosen.
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

/// Returns the id that the client has chosen. As in vLLM, the id comes from the header or, without the
/// header, from the body's `request_id`, which `field` gives as JSON. Returns `None` if there is no id, or if
/// the id is too long or has a forbidden character. Connectors read addresses from request ids, so with other
/// characters a client could make an engine connect to a foreign host.
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

/// Returns a UUID from this thread's random numbers. The kernel's random numbers would cost one system
/// call per request.
pub(crate) fn random() -> Uuid {
    Builder::from_random_bytes(rand::random()).into_uuid()
}

/// Returns the id as the value of a header.
pub(crate) fn header_value(id: &RequestId) -> HeaderValue {
    // `unique` and `chosen` accept only letters, digits, '-', '_' and '.'.
    HeaderValue::from_str(&id.0).expect("request ids are plain ASCII")
}

/// Maximum number of characters of a client's id. Log lines, engine-side ids and every message about the
/// request contain the id.
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
