//! Detects requests that come from this host, but were caused by a web page or by a client of another
//! proxy.
//!
//! A browser on this host also connects from a loopback address. A page can make the browser send every
//! request that needs no preflight, such as a request with a `text/plain` body. After DNS rebinding, a
//! page's request has a foreign name in `Host`.

use common::origin::{host, is_local, is_of_another_site};
use http::header::{CONTENT_TYPE, FORWARDED, ORIGIN, VIA};
use http::{HeaderMap, HeaderName};
use http_body::Body;

use crate::openai::error::{ApiError, Code};

/// Refuses a body that is not declared as JSON, as vLLM does. A page of another origin cannot send the
/// content type of JSON without a preflight, which the proxy does not answer.
///
/// # Errors
/// The content type is absent or not JSON.
pub(crate) fn require_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let given = headers.get(CONTENT_TYPE).map_or(&[][..], |v| v.as_bytes());
    let media = given.split(|b| *b == b';').next().unwrap_or_default();
    if media.trim_ascii().eq_ignore_ascii_case(b"application/json") {
        return Ok(());
    }
    let given: String = String::from_utf8_lossy(given).chars().take(80).collect();
    Err(ApiError::new(
        Code::UnsupportedMediaType,
        format!(
            "Unsupported Media Type: Only 'application/json' is allowed, not {given:?}: send the header \
             Content-Type: application/json"
        ),
    ))
}

/// Refuses a request that a page of another site has sent, unless its body is declared as JSON. A browser
/// asks the proxy before it sends JSON to another site, and the proxy does not answer such a question.
///
/// # Errors
/// A page of another site has sent the request.
pub(crate) fn refuse_other_sites(headers: &HeaderMap) -> Result<(), ApiError> {
    if is_of_another_site(headers) && require_json(headers).is_err() {
        let text = "a page of another site sent this request (Sec-Fetch-Site)";
        return Err(ApiError::new(Code::NotPermitted, text));
    }
    Ok(())
}

/// Refuses a body that is not declared as JSON. Accepts a request that has neither a body nor a content
/// type.
///
/// # Errors
/// There is a body or a content type, and the content type is not JSON.
pub(crate) fn require_json_if_any<B: Body>(headers: &HeaderMap, body: &B) -> Result<(), ApiError> {
    if body.is_end_stream() && !headers.contains_key(CONTENT_TYPE) {
        return Ok(());
    }
    require_json(headers)
}

/// Checks that a program on this host sent a request that comes from a loopback address. Requests of a
/// web page fail this check, and so do requests that another proxy forwards for its clients.
///
/// # Errors
/// A header shows that a web page or another proxy has sent the request. The error names this
/// header and the cure.
pub(crate) fn require_local(headers: &HeaderMap) -> Result<(), ApiError> {
    let refused = |text: String| Err(ApiError::new(Code::NotPermitted, text));
    if let Some(name) = headers.keys().find(|name| is_of_a_proxy(name)) {
        return refused(format!(
            "another proxy has forwarded this request ({name}): set --admin-key and send it, or ask the proxy \
             directly on its host"
        ));
    }
    refuse_pages(headers)
}

/// Refuses a request from a loopback address if a web page sent it.
///
/// # Errors
/// A header proves that a web page sent the request. The error names this header and the cure.
pub(crate) fn refuse_pages(headers: &HeaderMap) -> Result<(), ApiError> {
    let refused = |text: String| Err(ApiError::new(Code::NotPermitted, text));
    let host = host(headers);
    if !is_local(host) {
        return refused(format!(
            "the header Host is {host:?}: without the key of --admin-key it has to be localhost or a loopback \
             address"
        ));
    }
    if is_of_another_site(headers) {
        return refused("a page of another site sent this request (Sec-Fetch-Site)".into());
    }
    for origin in headers.get_all(ORIGIN) {
        let origin = origin.to_str().unwrap_or_default();
        let same = origin
            .split_once("://")
            .is_some_and(|(_, at)| at.eq_ignore_ascii_case(host));
        if !same {
            return refused(format!(
                "a page of {origin:.80?} sent this request (Origin), not one of {host:?}"
            ));
        }
    }
    Ok(())
}

/// Returns true for headers that proxies, load balancers and content delivery networks add.
fn is_of_a_proxy(name: &HeaderName) -> bool {
    let others = [
        "x-real-ip",
        "x-client-ip",
        "x-original-forwarded-for",
        "true-client-ip",
        "cf-connecting-ip",
        "x-envoy-external-address",
    ];
    *name == FORWARDED
        || *name == VIA
        || name.as_str().starts_with("x-forwarded-")
        || others.contains(&name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(all: &[(&str, &str)]) -> HeaderMap {
        let parsed = |(name, value): &(&str, &str)| {
            let name: HeaderName = name.parse().unwrap();
            (name, value.parse().unwrap())
        };
        all.iter().map(parsed).collect()
    }

    #[test]
    fn only_programs_of_this_host_are_local() {
        let check = |all: &[(&str, &str)], ok: bool| {
            assert_eq!(require_local(&headers(all)).is_ok(), ok, "{all:?}");
        };
        for host in [
            "localhost",
            "LOCALHOST:8000",
            "pd.localhost:1",
            "127.0.0.2:8000",
            "[::1]:8000",
            "[::1]",
        ] {
            check(&[("host", host)], true);
        }
        for host in [
            "evil.example",
            "127.0.0.1.evil.example:8000",
            "10.0.0.1:8000",
            "[::2]",
            "",
        ] {
            check(&[("host", host)], false);
        }
        check(&[], false);
        let host = ("host", "localhost:8000");
        check(&[host, ("origin", "http://localhost:8000")], true);
        check(&[host, ("sec-fetch-site", "none")], true);
        for other in [
            ("origin", "http://evil.example"),
            ("origin", "http://localhost:3000"),
            ("origin", "null"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("x-forwarded-for", "10.0.0.1"),
            ("x-forwarded-proto", "https"),
            ("forwarded", "for=10.0.0.1"),
            ("x-real-ip", "10.0.0.1"),
            ("via", "1.1 gateway"),
        ] {
            check(&[host, other], false);
        }
    }

    #[test]
    fn bodies_are_json() {
        let check = |kind: &str, ok: bool| {
            let result = require_json(&headers(&[("content-type", kind)]));
            assert_eq!(result.is_ok(), ok, "{kind}");
        };
        check("application/json", true);
        check("Application/JSON; charset=utf-8", true);
        check("text/plain", false);
        check("application/jsonp", false);
        check("application/x-www-form-urlencoded", false);
        assert!(require_json(&HeaderMap::new()).is_err());
        let none = axum::body::Body::empty();
        assert!(require_json_if_any(&HeaderMap::new(), &none).is_ok());
        let some = axum::body::Body::from("{}");
        assert!(require_json_if_any(&HeaderMap::new(), &some).is_err());
    }
}
