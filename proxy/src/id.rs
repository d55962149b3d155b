//! The id of a request: in both legs, both sidecars and all logs.

use http::{HeaderMap, HeaderValue};
use protocol::RequestId;
use uuid::{Builder, Uuid};

/// The header that carries it.
pub const HEADER: &str = "x-request-id";

/// The id of a new request: the client's own, made safe and unique, or a new one.
///
/// A client's id alone would not do: a client that repeats a request under the same id would have
/// two requests share slots.
pub fn assign(headers: &HeaderMap) -> RequestId {
    let wanted: String = headers
        .get(HEADER)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
        .take(MAX_CLIENT_CHARS)
        .collect();
    RequestId(if wanted.is_empty() {
        random().to_string()
    } else {
        format!("{wanted}-{:08x}", rand::random::<u32>())
    })
}

/// A UUID of this thread's random numbers: asking the kernel for each would be a system call a request.
pub fn random() -> Uuid {
    Builder::from_random_bytes(rand::random()).into_uuid()
}

/// The id as a header.
pub fn header_value(id: &RequestId) -> HeaderValue {
    // `assign` lets only letters, digits, '-', '_' and '.' through.
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
