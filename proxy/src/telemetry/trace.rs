//! OpenTelemetry: the W3C trace context of a request, and its spans in OTLP's JSON form.

use http::{HeaderMap, HeaderValue};
use serde_json::{Value, json};

use crate::telemetry::record::Record;

/// The position of a request in its trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trace {
    /// The trace's id: 32 hex digits.
    trace: String,
    /// The id of the client's span, 16 hex digits; `None` if the client has sent none.
    parent: Option<String>,
    /// The id of this request's span: 16 hex digits.
    span: String,
    /// True if the client wants the trace recorded, or has sent no trace context.
    pub is_sampled: bool,
}

impl Trace {
    /// Continues the trace that a client has sent, or begins a new trace.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let sent = headers
            .get(HEADER)
            .and_then(|value| value.to_str().ok())
            .and_then(parse);
        let span = format!("{:016x}", rand::random_range(1..=u64::MAX));
        match sent {
            Some((trace, parent, is_sampled)) => Self {
                trace,
                parent: Some(parent),
                span,
                is_sampled,
            },
            None => Self {
                trace: format!("{:032x}", rand::random_range(1..=u128::MAX)),
                parent: None,
                span,
                is_sampled: true,
            },
        }
    }

    /// Sets the header of a leg, so that its engine's spans become children of this request's span.
    pub(crate) fn pass_on(&self, headers: &mut HeaderMap) {
        let flags = if self.is_sampled { "01" } else { "00" };
        let text = format!("00-{}-{}-{flags}", self.trace, self.span);
        // The text consists of hex digits and dashes, so the conversion does not fail.
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(HEADER, value);
        }
    }

    /// Returns the spans of a request that has ended: a span for the whole request, and a span for each leg
    /// whose times are known.
    pub(crate) fn spans(&self, record: &Record) -> Vec<Value> {
        let start = record.arrived_unix_ms as f64;
        let span = |name: String, kind: u8, from: f64, to: f64, more: Value| {
            json!({
                "traceId": self.trace,
                "name": name,
                "kind": kind,
                "startTimeUnixNano": nanos(start + from),
                "endTimeUnixNano": nanos(start + to.max(from)),
                "attributes": attributes(&more),
            })
        };
        // The span of the whole request: the parent of the legs' spans.
        let whole = json!({
            "request.id": record.id, "outcome": record.outcome, "choice": record.choice,
            "alone": record.alone, "http.response.status_code": record.status,
            "prompt_tokens": record.prompt_tokens, "completion_tokens": record.completion_tokens,
            "moved_bytes": record.moved.as_ref().map(|moved| moved.bytes),
            "ttft_ms": record.ttft_ms, "error.message": record.error,
        });
        let mut root = span(
            format!("request {}", record.endpoint),
            SERVER,
            0.0,
            record.total_ms,
            whole,
        );
        root["spanId"] = json!(self.span);
        root["parentSpanId"] = json!(self.parent);
        if !matches!(record.outcome, "done" | "client_left") {
            root["status"] = json!({"code": ERROR, "message": record.error});
        }
        let mut all = vec![root];
        let mut child = |name: &str, from: f64, to: f64, more: Value| {
            let mut leg = span(name.to_owned(), CLIENT, from, to, more);
            leg["spanId"] = json!(format!("{:016x}", rand::random_range(1..=u64::MAX)));
            leg["parentSpanId"] = json!(self.span);
            all.push(leg);
        };
        // A leg gets a span only if its time is known, so that a leg that did not happen does not look like
        // a fast leg.
        if let (Some(prefill), Some(end)) = (&record.prefill, record.prefill_ms) {
            let more = json!({"instance": prefill, "begun_ms": record.begun_ms,
                "error.message": record.prefill_error});
            child("prefill leg", 0.0, end, more);
        }
        if let (Some(decode), Some(sent)) = (&record.decode, record.decode_sent_ms) {
            let more = json!({"instance": decode, "attempts": record.decode_attempts});
            child("decode leg", sent, record.total_ms, more);
        }
        all
    }
}

/// Parses `00-TRACE-SPAN-FLAGS`, the format of W3C's recommendation. Returns the trace's id, the span's id,
/// and true if the trace is sampled; `None` if the text is invalid.
fn parse(text: &str) -> Option<(String, String, bool)> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    let is_id = |text: &str, digits: usize| is_hex(text, digits) && text.bytes().any(|b| b != b'0');
    // Later versions may append parts; version 00 has exactly four parts.
    let ends_well = version != "00" || parts.next().is_none();
    let ok = is_hex(version, 2)
        && version != "ff"
        && is_id(trace, 32)
        && is_id(span, 16)
        && is_hex(flags, 2);
    let flags = u8::from_str_radix(flags, 16)
        .ok()
        .filter(|_| ok && ends_well)?;
    Some((trace.to_owned(), span.to_owned(), flags & 1 == 1))
}

/// Converts the attributes that are not null into OTLP's form.
fn attributes(all: &Value) -> Vec<Value> {
    let Some(all) = all.as_object() else {
        return Vec::new();
    };
    let value = |value: &Value| match value {
        Value::Null => None,
        Value::String(text) => Some(json!({"stringValue": text})),
        // 64-bit numbers are strings in OTLP's JSON.
        Value::Number(number) if number.is_u64() => Some(json!({"intValue": number.to_string()})),
        Value::Number(number) => Some(json!({"doubleValue": number})),
        other => Some(json!({"stringValue": other.to_string()})),
    };
    all.iter()
        .filter_map(|(key, found)| Some(json!({"key": key, "value": value(found)?})))
        .collect()
}

/// Converts milliseconds since 1970 to OTLP's text of nanoseconds.
fn nanos(unix_ms: f64) -> String {
    format!("{:.0}", unix_ms * 1e6)
}

const HEADER: &str = "traceparent";

/// OTLP's numbers of the span kinds SERVER and CLIENT, and of the status ERROR.
const SERVER: u8 = 2;
const CLIENT: u8 = 3;
const ERROR: u8 = 2;

#[cfg(test)]
mod tests;
