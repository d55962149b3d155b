//! Metrics of each model that the proxy serves.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::instances::escaped;
use crate::routing::models::ModelState;

/// Writes the metrics of these models in the text format of OpenMetrics. Like the metrics of instances, they are not
/// families of the registry. The label is a name that an engine or the configuration gave, never a client's text.
pub(super) fn write(out: &mut String, models: &[Arc<ModelState>]) -> fmt::Result {
    type Read = fn(&ModelState) -> f64;
    let all: [(&str, &str, &str, Read); 6] = [
        ("in_flight_requests", "gauge", "Requests under way", |m| {
            read(&m.counts.in_flight)
        }),
        ("requests", "counter", "Requests that have ended", |m| {
            read(&m.counts.ended)
        }),
        (
            "transfers",
            "counter",
            "Decode legs sent with transfer parameters",
            |m| read(&m.counts.transfers),
        ),
        (
            "alone",
            "counter",
            "Decode legs sent without transfer parameters",
            |m| read(&m.counts.alone),
        ),
        ("begun", "counter", "Answers that have begun", |m| {
            read(&m.counts.begun)
        }),
        (
            "first_byte_seconds",
            "counter",
            "Sum of the times to the first bytes of these answers",
            |m| read(&m.counts.first_byte_us) / 1e6,
        ),
    ];
    for (name, kind, help, read) in all {
        writeln!(out, "# HELP pd_proxy_model_{name} {help}.")?;
        writeln!(out, "# TYPE pd_proxy_model_{name} {kind}")?;
        let total = if kind == "counter" { "_total" } else { "" };
        for model in models {
            let label = escaped(&model.name);
            let value = read(model);
            writeln!(
                out,
                "pd_proxy_model_{name}{total}{{model=\"{label}\"}} {value}"
            )?;
        }
    }
    Ok(())
}

fn read(count: &AtomicU64) -> f64 {
    count.load(Ordering::Relaxed) as f64
}
