//! The model that a request names.

use std::borrow::Cow;

use http::HeaderMap;
use http::header::CONTENT_TYPE;
use memchr::memmem;
use serde::Deserialize;

/// Returns the text of a JSON string; `None` if the value is another JSON value, or empty. vLLM, too, treats an empty
/// name like an absent name.
pub(crate) fn name(json: &str) -> Option<Cow<'_, str>> {
    let inner = json.strip_prefix('"')?.strip_suffix('"')?;
    let name = match inner.contains('\\') {
        false => Cow::Borrowed(inner),
        true => Cow::Owned(serde_json::from_str(json).ok()?),
    };
    Some(name).filter(|name| !name.is_empty())
}

/// Returns the model in a body that the proxy passes on unread: JSON, or a form with several parts. Returns `None` if
/// the body names none, or has another form.
pub(crate) fn of_opaque(headers: &HeaderMap, body: &[u8]) -> Option<String> {
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let kind = kind.unwrap_or_default();
    if kind
        .get(..FORM.len())
        .is_some_and(|start| start.eq_ignore_ascii_case(FORM))
    {
        return of_form(boundary(kind)?, body).map(str::to_owned);
    }
    let named: Named<'_> = serde_json::from_slice(body).ok()?;
    named
        .model
        .map(Cow::into_owned)
        .filter(|name| !name.is_empty())
}

/// The part of a JSON body that names the model.
#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow, default)]
    model: Option<Cow<'a, str>>,
}

/// Returns the boundary that a content type names.
fn boundary(kind: &str) -> Option<&str> {
    let parameters = kind.split(';').skip(1);
    let (_, value) = parameters
        .filter_map(|parameter| parameter.split_once('='))
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("boundary"))?;
    let value = value.trim().trim_matches('"');
    (1..=MAX_BOUNDARY_BYTES)
        .contains(&value.len())
        .then_some(value)
}

/// Returns the value of the form's field `model`.
fn of_form<'a>(boundary: &str, body: &'a [u8]) -> Option<&'a str> {
    let delimiter = format!("--{boundary}");
    let mut starts = memmem::find_iter(body, delimiter.as_bytes());
    let mut start = starts.next()? + delimiter.len();
    for end in starts.take(MAX_PARTS) {
        let part = &body[start..end];
        start = end + delimiter.len();
        let Some(blank) = memmem::find(part, b"\r\n\r\n") else {
            continue;
        };
        if is_model(&part[..blank]) {
            let value = part[blank + 4..].trim_ascii();
            let value = std::str::from_utf8(value).ok()?;
            return (1..=MAX_VALUE_BYTES)
                .contains(&value.len())
                .then_some(value);
        }
    }
    None
}

/// Returns true if these are the headers of the form's field `model`.
fn is_model(headers: &[u8]) -> bool {
    let Ok(headers) = std::str::from_utf8(headers) else {
        return false;
    };
    headers
        .split("\r\n")
        .filter(|line| {
            line.to_ascii_lowercase()
                .starts_with("content-disposition:")
        })
        .flat_map(|line| line.split(';').skip(1))
        .filter_map(|parameter| parameter.split_once('='))
        .any(|(name, value)| {
            name.trim().eq_ignore_ascii_case("name") && value.trim().trim_matches('"') == "model"
        })
}

const FORM: &str = "multipart/form-data";
/// The longest boundary in bytes, as RFC 2046 limits it.
const MAX_BOUNDARY_BYTES: usize = 70;
/// Maximum number of parts that are searched. An audio form has fewer than twenty.
const MAX_PARTS: usize = 256;
/// The longest value in bytes. No instance serves a model with a longer name.
const MAX_VALUE_BYTES: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn names() {
        let check = |json: &str, expect: Option<&str>| {
            assert_eq!(name(json).as_deref(), expect, "{json}");
        };
        check(r#""m""#, Some("m"));
        check(r#""a\"bé""#, Some("a\"bé"));
        check(r#""""#, None);
        check("7", None);
        check(r#"["m"]"#, None);
        check(r#"""#, None);
    }

    #[test]
    fn bodies_that_are_passed_on() {
        let check = |kind: &str, body: &str, expect: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_str(kind).unwrap());
            let read = of_opaque(&headers, body.as_bytes());
            assert_eq!(read.as_deref(), expect, "{kind} {body}");
        };
        check(
            "application/json",
            r#"{"input": [1], "model": "m"}"#,
            Some("m"),
        );
        check("text/plain", r#"{"model": "a\nb"}"#, Some("a\nb"));
        check("application/json", r#"{"model": null}"#, None);
        check("application/json", r#"{"model": ""}"#, None);
        check("application/json", "[1", None);
        let part = |name: &str, value: &str| {
            format!("--x\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
        };
        let form = format!(
            "{}{}--x--\r\n",
            part("file", "RIFF\r\n\r\nmodel"),
            part("model", "m")
        );
        check("multipart/form-data; boundary=x", &form, Some("m"));
        check(
            "Multipart/Form-Data; charset=a; Boundary=\"x\"",
            &form,
            Some("m"),
        );
        check("multipart/form-data", &form, None);
        check("multipart/form-data; boundary=y", &form, None);
        check("multipart/form-data; boundary=x", &part("model", "m"), None);
        let none = format!("{}--x--", part("file", "name=\"model\""));
        check("multipart/form-data; boundary=x", &none, None);
    }
}
