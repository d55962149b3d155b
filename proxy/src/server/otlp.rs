//! Sends spans to a collector by OTLP over HTTP, in JSON.
//!
//! The proxy does not use the exporter of the OpenTelemetry SDK. The exporter would add a protocol compiler
//! and a second HTTP client, although a single POST in a documented format is enough.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::select;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use crate::state::app::App;

/// The task that sends the spans.
#[derive(Debug)]
pub(crate) struct Exporter {
    app: Arc<App>,
    url: String,
    spans: mpsc::Receiver<Value>,
    is_failing: bool,
}

impl Exporter {
    /// Returns a task that takes spans from the queue `spans` and sends them to the collector at
    /// the URL `base`.
    pub(crate) fn new(app: Arc<App>, base: &str, spans: mpsc::Receiver<Value>) -> Self {
        Self {
            app,
            url: format!("{}/v1/traces", base.trim_end_matches('/')),
            spans,
            is_failing: false,
        }
    }

    /// Sends spans until `stop` is cancelled, and then sends the spans that are still in the queue.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut batch = Vec::new();
        let mut due = Instant::now();
        loop {
            let more = select! {
                biased;
                () = stop.cancelled() => break,
                more = self.spans.recv_many(&mut batch, BATCH) => more,
                () = sleep_until(due), if !batch.is_empty() => {
                    self.send(std::mem::take(&mut batch)).await;
                    continue;
                }
            };
            if more == 0 {
                break;
            }
            if batch.len() == more {
                due = Instant::now() + GATHER;
            }
            if batch.len() >= BATCH {
                self.send(std::mem::take(&mut batch)).await;
            }
        }
        while let Ok(span) = self.spans.try_recv() {
            batch.push(span);
        }
        if !batch.is_empty() {
            self.send(batch).await;
        }
    }

    /// Sends one batch, and counts its spans as sent or failed. If several batches in a row fail, logs only
    /// the first failure.
    async fn send(&mut self, spans: Vec<Value>) {
        let count = spans.len();
        let body = json!({"resourceSpans": [{
            "resource": {"attributes": [
                {"key": "service.name", "value": {"stringValue": "pd-proxy"}},
                {"key": "service.version", "value": {"stringValue": env!("CARGO_PKG_VERSION")}},
            ]},
            "scopeSpans": [{"scope": {"name": "pd-proxy"}, "spans": spans}],
        }]});
        let sent = self
            .app
            .client
            .post_json(&self.url, body.to_string().into(), TIMEOUT)
            .await;
        let error = match sent {
            Ok((status, _)) if status.is_success() => {
                self.is_failing = false;
                self.app.metrics.spans("sent", count);
                return;
            }
            Ok((status, _)) => status.to_string(),
            Err(error) => error.to_string(),
        };
        self.app.metrics.spans("failed", count);
        if !std::mem::replace(&mut self.is_failing, true) {
            warn!(
                url = self.url,
                error, "the collector does not take spans: they are dropped"
            );
        }
    }
}

/// Maximum number of spans in the queue. Further spans are dropped and counted, so that a slow collector
/// cannot use up the memory.
pub(crate) const QUEUE: usize = 8192;
/// Maximum number of spans in one POST.
const BATCH: usize = 512;
/// Time after which spans are sent even if they do not fill a POST.
const GATHER: Duration = Duration::from_secs(1);
/// Longest time for one POST. A collector at the same site answers at once.
const TIMEOUT: Duration = Duration::from_secs(5);
