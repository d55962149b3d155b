//! One request in flight: its state, the resources that it holds, and its record.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use http::StatusCode;
use protocol::RequestId;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use crate::fleet::instance::Instance;
use crate::fleet::load::LoadGuard;
use crate::openai::endpoint::Endpoint;
use crate::openai::error::ApiError;
use crate::openai::fallback::Fallback;
use crate::openai::usage::Usage;
use crate::request::route_plan::RoutePlan;
use crate::request::state::{Action, Event, RequestState};
use crate::routing::Pair;
use crate::routing::models::ModelState;
use crate::state::app::App;
use crate::state::in_flight::{InFlightGuard, Progress};
use crate::telemetry::outcome::Outcome;
use crate::telemetry::record::Record;
use crate::telemetry::trace::Trace;
use crate::upstream::client::PrefillEnd;

/// One request in flight. If the context is dropped before the request has ended, the client has left. At the
/// end of the request both legs are dropped, the request's place becomes free, and its log line is written.
#[derive(Debug)]
pub(crate) struct RequestContext {
    /// The id of the request.
    pub id: RequestId,
    app: Arc<App>,
    model: Arc<ModelState>,
    state: RequestState,
    endpoint: Endpoint,
    arrived: Instant,
    record: Record,
    trace: Option<Trace>,
    place: Option<InFlightGuard>,
    prefill: Option<AbortOnDropHandle<PrefillEnd>>,
    /// The load that the prefill and the decode leg put on their instances; `None` for a leg that is not
    /// in flight.
    load_guards: [Option<LoadGuard>; 2],
    // The permit must stay the last field: fields are dropped in order, and the request's place may become
    // free only after all other fields are dropped.
    _permit: OwnedSemaphorePermit,
}

impl RequestContext {
    /// Returns the context of a request that has been routed, and the first action.
    pub(crate) fn begin(
        app: &Arc<App>,
        permit: OwnedSemaphorePermit,
        arrived: Instant,
        endpoint: Endpoint,
        id: RequestId,
        (pair, plan): (&Pair, &RoutePlan),
        trace: Option<Trace>,
    ) -> (Self, Action) {
        let legs = pair
            .prefill
            .as_ref()
            .map(drop)
            .map_err(|fallback| *fallback);
        let (state, action) = RequestState::begin(legs);
        let prefill = pair.prefill.as_ref().ok();
        let record = Record {
            id: id.0.clone(),
            arrived_unix_ms: unix_ms(),
            endpoint: endpoint.name(),
            prefill: prefill.map(|prefill| prefill.id.clone()),
            decode: Some(pair.decode.id.clone()),
            choice: pair.choice.to_string(),
            held_tokens: plan.held(&prefill.unwrap_or(&pair.decode).id),
            ..Record::default()
        };
        app.metrics.arrived();
        let model = Arc::clone(&plan.model);
        model.counts.arrived();
        let context = Self {
            id,
            app: Arc::clone(app),
            model,
            state,
            endpoint,
            arrived,
            record,
            trace,
            place: None,
            prefill: None,
            load_guards: [None, None],
            _permit: permit,
        };
        (context, action)
    }

    /// Handles an event and returns the next action. If the event ends the request, its legs are dropped.
    pub(crate) fn on(&mut self, event: Event) -> Action {
        let action = self.state.on(event);
        if let Some(outcome) = self.state.outcome() {
            self.end(outcome);
        }
        action
    }

    /// Returns the endpoint that the client has called.
    pub(crate) fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Returns the time at which the request arrived.
    pub(crate) fn arrived(&self) -> Instant {
        self.arrived
    }

    /// Returns true while the request waits for its prefill leg.
    pub(crate) fn is_prefilling(&self) -> bool {
        self.state == RequestState::Prefilling
    }

    /// Returns the request's progress; `None` if no prefill leg was sent.
    pub(crate) fn progress(&self) -> Option<Arc<Progress>> {
        self.place.as_ref().map(|place| Arc::clone(&place.progress))
    }

    /// Returns the prefill leg; `None` if none is in flight.
    pub(crate) fn prefill_mut(&mut self) -> Option<&mut AbortOnDropHandle<PrefillEnd>> {
        self.prefill.as_mut()
    }

    /// Stores the prefill leg.
    pub(crate) fn set_prefill(&mut self, leg: AbortOnDropHandle<PrefillEnd>) {
        self.prefill = Some(leg);
    }

    /// Drops the prefill leg, because the leg has ended or its answer is not needed any more.
    pub(crate) fn drop_prefill(&mut self) {
        self.prefill = None;
        self.load_guards[0] = None;
    }

    /// Notes that a prefill leg is sent, and enters the request in `in_flight`, so that messages about the
    /// leg find the request.
    pub(crate) fn prefill_sent(
        &mut self,
        id: &RequestId,
        to: &Instance,
        tokens: u64,
    ) -> Arc<Progress> {
        let place = self.app.in_flight.enter(id, &to.id);
        let progress = Arc::clone(&place.progress);
        self.place = Some(place);
        self.load_guards[0] = Some(to.load.charge(tokens));
        self.record.prefill = Some(to.id.clone());
        self.record.leg_id = (*id != self.id).then(|| id.0.clone());
        progress
    }

    /// Returns true if the last decode leg was sent with a transfer, and its answer has not begun.
    pub(crate) fn waits_for_kv(&self) -> bool {
        matches!(
            self.state,
            RequestState::Decoding {
                transfer: Ok(()),
                ..
            }
        )
    }

    /// Notes that a decode leg is sent.
    pub(crate) fn decode_sent(
        &mut self,
        to: &Instance,
        transfer: Result<(), Fallback>,
        tokens: u64,
    ) {
        self.app.metrics.decode_sent(transfer);
        self.model.counts.decode_sent(transfer.is_ok());
        self.load_guards[1] = Some(to.load.charge(tokens));
        self.record.decode = Some(to.id.clone());
        self.record.alone = transfer.err().map(Fallback::as_str);
        self.record.decode_attempts += 1;
        self.record
            .decode_sent_ms
            .get_or_insert(millis(self.arrived.elapsed()));
    }

    /// Notes the first bytes of the answer, and its status.
    pub(crate) fn first_byte(&mut self, status: StatusCode, stream: bool) {
        if self.record.ttft_ms.is_none() {
            let after = self.arrived.elapsed();
            if self.endpoint.generates() {
                self.app.metrics.first_byte_after(after);
                self.model.counts.first_byte_after(after);
            }
            self.record.ttft_ms = Some(millis(after));
        }
        self.record.status = Some(status.as_u16());
        self.record.stream = stream;
    }

    /// Notes that the decode engine has shown a sign of work.
    pub(crate) fn heard(&self, now: Instant) {
        if let Some(guard) = &self.load_guards[1] {
            guard.load().heard(now);
        }
    }

    /// Returns true if the decode engine is dead; see `Load::is_dead`.
    pub(crate) fn is_decode_dead(
        &self,
        now: Instant,
        silent_since: Instant,
        limit: Duration,
    ) -> bool {
        let guard = self.load_guards[1].as_ref();
        guard.is_some_and(|guard| guard.load().is_dead(now, silent_since, limit))
    }

    /// Notes an error and the status that the client gets.
    pub(crate) fn failed(&mut self, status: StatusCode, error: String) {
        self.record.status = Some(status.as_u16());
        self.record.error = Some(error);
    }

    /// Notes the reason why an answer broke off.
    pub(crate) fn broke(&mut self, error: &ApiError) {
        self.record.error = Some(error.to_string());
    }

    /// Ends the request: its answer has been passed on completely.
    pub(crate) fn answered(&mut self, ends_with_error: bool) {
        let status = self
            .record
            .status
            .and_then(|s| StatusCode::from_u16(s).ok());
        if ends_with_error {
            self.record.error = Some("the decode engine ended its stream with an error".into());
            self.on(Event::AnswerBroke);
        } else if status.is_some_and(|status| status.is_client_error()) {
            self.on(Event::AnswerRefused);
        } else {
            self.on(Event::AnswerEnded);
        }
    }

    /// Notes the decode engine's token counts.
    pub(crate) fn counted(&mut self, usage: Usage) {
        self.record.prompt_tokens = Some(usage.prompt_tokens);
        self.record.completion_tokens = Some(usage.completion_tokens);
    }

    /// Ends the request: drops its legs, and writes its metrics, log line, spans and record.
    fn end(&mut self, outcome: Outcome) {
        let total = self.arrived.elapsed();
        self.drop_prefill();
        self.load_guards = [None, None];
        if let Some(place) = self.place.take() {
            self.note_prefill(&place.progress);
        }
        self.app.metrics.ended(self.endpoint, outcome, total);
        self.model.counts.ended();
        // Probes come every few seconds. Their records would displace the records of other requests.
        if self.endpoint.is_probe() && outcome == Outcome::Done {
            return;
        }
        let mut record = std::mem::take(&mut self.record);
        record.total_ms = millis(total);
        record.outcome = outcome.as_str();
        log(&record);
        self.export(&record);
        self.app.recent.push(record);
    }

    /// Queues the request's spans for the collector. If the queue is full, the spans are dropped and counted.
    fn export(&self, record: &Record) {
        let (Some(spans), Some(trace)) = (&self.app.spans, &self.trace) else {
            return;
        };
        if !trace.is_sampled {
            return;
        }
        for span in trace.spans(record) {
            if spans.try_send(span).is_err() {
                self.app.metrics.spans("dropped", 1);
            }
        }
    }

    /// Copies the times and the result of the prefill leg into the record and the metrics.
    fn note_prefill(&mut self, progress: &Progress) {
        let since = |at: Instant| at.saturating_duration_since(self.arrived);
        if let Some(at) = progress.begun_at() {
            self.app.metrics.begun_after(since(at));
            self.record.begun_ms = Some(millis(since(at)));
        }
        if let Some(note) = progress.prefill_end() {
            self.app.metrics.prefill_after(since(note.at));
            if note.error.is_none() {
                self.app.prefill_times.add(since(note.at));
            }
            self.record.prefill_ms = Some(millis(since(note.at)));
            self.record.prefill_error.clone_from(&note.error);
            self.record.prompt_tokens = self.record.prompt_tokens.or(note.prompt_tokens);
        }
        self.record.moved = progress.moved();
    }
}

impl Drop for RequestContext {
    fn drop(&mut self) {
        if self.state.outcome().is_none() {
            self.on(Event::ClientLeft);
        }
    }
}

/// Writes the request's log line.
fn log(r: &Record) {
    let moved = r.moved.as_ref();
    info!(
        id = r.id,
        leg_id = r.leg_id.as_deref(),
        endpoint = r.endpoint,
        prefill = r.prefill.as_deref(),
        decode = r.decode.as_deref(),
        choice = r.choice,
        alone = r.alone,
        begun_ms = r.begun_ms,
        prefill_ms = r.prefill_ms,
        prefill_error = r.prefill_error.as_deref(),
        ttft_ms = r.ttft_ms,
        total_ms = r.total_ms,
        prompt_tokens = r.prompt_tokens,
        completion_tokens = r.completion_tokens,
        bytes = moved.map(|m| m.bytes),
        transport = moved
            .map(|m| m.transport.as_str())
            .filter(|t| !t.is_empty()),
        push_reason = moved.and_then(|m| m.reason).map(|reason| reason.as_str()),
        attempts = r.decode_attempts,
        status = r.status,
        error = r.error.as_deref(),
        outcome = r.outcome,
        "request"
    );
}

/// Converts a duration to milliseconds, rounded to microseconds.
fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn unix_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
