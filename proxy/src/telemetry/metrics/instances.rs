//! Metrics of each registered instance.

use std::fmt::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use crate::fleet::instance::Instance;
use crate::fleet::load::LoadSnapshot;

/// Writes the metrics of these instances in the text format of OpenMetrics. These metrics are not families of
/// the registry, because instances come and go, and because prometheus-client 0.23 does not escape label
/// values.
pub(super) fn write(out: &mut String, instances: &[Arc<Instance>]) -> fmt::Result {
    type Read = fn(&Instance) -> f64;
    let all: [(&str, &str, &str, Read); 6] = [
        ("legs", "gauge", "Legs under way", |i| {
            f64::from(snapshot(i).legs)
        }),
        (
            "tokens",
            "gauge",
            "Tokens of legs under way, estimated",
            |i| snapshot(i).tokens as f64,
        ),
        (
            "paused",
            "gauge",
            "1 while the instance keeps failing and gets no requests",
            |i| f64::from(u8::from(snapshot(i).is_open)),
        ),
        ("answered", "counter", "Legs that were answered", |i| {
            i.load.done().answered as f64
        }),
        (
            "answer_seconds",
            "counter",
            "Sum of the times to the first byte of these answers",
            |i| i.load.done().seconds,
        ),
        (
            "failed",
            "counter",
            "Legs that failed through the instance's fault",
            |i| i.load.done().failed as f64,
        ),
    ];
    for (name, kind, help, read) in all {
        writeln!(out, "# HELP pd_proxy_instance_{name} {help}.")?;
        writeln!(out, "# TYPE pd_proxy_instance_{name} {kind}")?;
        let total = if kind == "counter" { "_total" } else { "" };
        for instance in instances {
            let id = escaped(&instance.id);
            let value = read(instance);
            writeln!(
                out,
                "pd_proxy_instance_{name}{total}{{instance=\"{id}\"}} {value}"
            )?;
        }
    }
    Ok(())
}

fn snapshot(instance: &Instance) -> LoadSnapshot {
    instance.load.snapshot(Instant::now())
}

/// Escapes a label value, so that an instance's name cannot end its label early and forge other metrics.
pub(super) fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use protocol::registration::InstanceRole;

    use super::*;
    use crate::connectors::Connector;
    use crate::fleet::instance::{Named, Source};
    use crate::telemetry::metrics::Metrics;

    #[test]
    fn names_of_instances_cannot_end_their_label() {
        let named = Named {
            role: InstanceRole::Decode,
            url: "http://d:1".into(),
            id: Some("a\"}b\\".into()),
            connector: Connector::Nixl,
            host: None,
            init_ports: Vec::new(),
            alloc_ports: Vec::new(),
            zmq: None,
            models: Vec::new(),
        };
        let instance = Arc::new(Instance::named(&named, Source::Added).unwrap());
        drop(instance.load.charge(5));
        let _running = instance.load.charge(7);
        let text = Metrics::new().text(&[instance], &[]);
        let line = "pd_proxy_instance_tokens{instance=\"a\\\"}b\\\\\"} 7\n";
        assert!(text.contains(line), "{text}");
        assert!(text.ends_with("# EOF\n"));
        assert_eq!(text.matches("# EOF").count(), 1);
    }
}
