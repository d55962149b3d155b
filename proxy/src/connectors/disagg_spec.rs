//! The transfer parameters that name a receiver, as LMCache and sidecars read them.

use std::fmt::Write;

use crate::connectors::Legs;

/// Returns transfer parameters with `disagg_spec`: the request's id and the receiver's address. `before` and
/// `after` are further JSON fields: the fields in `before` stand beside `disagg_spec`, the fields in `after`
/// stand inside it.
pub(super) fn to_receiver(legs: &Legs<'_>, before: &str, after: &str) -> String {
    // Request ids are letters, digits, '-', '_' and '.', which need no escaping. Hosts may be anything
    // printable, so they are escaped.
    let host = serde_json::Value::from(legs.decode.host);
    let mut text = format!(
        r#"{{{before}"disagg_spec":{{"req_id":"{}","receiver_host":{host},"receiver_init_port":"#,
        legs.id.0
    );
    // Writing into a string cannot fail.
    let _ = write!(
        text,
        r#"{:?},"receiver_alloc_port":{:?}{after}}}}}"#,
        legs.decode.init_ports, legs.decode.alloc_ports
    );
    text
}
