//! Sends a request's prefill leg, and handles its end.

use std::sync::Arc;
use std::time::Instant;

use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::{Drive, Side, Step};
use crate::config::cli::FirstTokenFrom;
use crate::connectors::Handoff;
use crate::connectors::answer::Prefilled;
use crate::fleet::instance::Instance;
use crate::openai::fallback::Fallback;
use crate::request::context::RequestContext;
use crate::request::prefill_request::PrefillLeg;
use crate::request::state::Event;
use crate::state::in_flight::PrefillNote;
use crate::telemetry::labels::Leg;
use crate::upstream::client::PrefillEnd;

impl Drive {
    /// Sends the prefill leg in its own task, if the request has a prefill instance.
    pub(super) fn send_prefill(&mut self, context: &mut RequestContext) {
        let Ok(prefill) = &self.pair.prefill else {
            return;
        };
        // Routing chooses only pairs with a hand-off. If a pair had no hand-off, no leg would be sent, and
        // the request would wait until the prefill timeout.
        let Some(handoff) = self.handoff(prefill) else {
            return;
        };
        self.handoff = Some(handoff);
        self.prefill_attempts += 1;
        let id = handoff.address_id(&prefill.kv_address(), &self.pair.decode.kv_address());
        self.is_address_id = id.is_some();
        self.leg_id = id.unwrap_or_else(|| context.id.clone());
        if self.prefill_attempts > 1 && prefill.connector.spec().has_sidecar {
            // The first sender may have contacted the receiver already. A new id keeps the two transfers
            // apart.
            self.leg_id.0 += &format!(".{}", self.prefill_attempts);
        }
        self.prefill_sent = Instant::now();
        let progress = context.prefill_sent(&self.leg_id, prefill, self.plan.tokens);
        prefill
            .load
            .chosen(self.prefill_sent, self.app.config.breaker());
        let leg = PrefillLeg {
            client: self.app.client.clone(),
            endpoint: self.endpoint,
            path: self.path.clone(),
            headers: self.leg_headers(&self.leg_id),
            body: self.body.clone(),
            id: self.leg_id.clone(),
            prefill: Arc::clone(prefill),
            decode: Arc::clone(&self.pair.decode),
            handoff,
            overlap: self.overlaps(),
        };
        let task = tokio::spawn(async move {
            let end = leg.run(&progress).await;
            progress.prefill_ended(PrefillNote::of(&end));
            end
        });
        context.set_prefill(AbortOnDropHandle::new(task));
    }

    /// Returns the hand-off from `prefill` to the current decode instance; `None` if the two cannot be a
    /// pair.
    fn handoff(&self, prefill: &Instance) -> Option<&'static dyn Handoff> {
        let decode = self.pair.decode.connector;
        let handoff = decode.receives_from(prefill.connector)?;
        // Only the client of a stream benefits from an early first token.
        let wants_first_token = self.app.config.first_token == FirstTokenFrom::Prefill
            && self.body.streams()
            && self.plan.is_splittable;
        let first_token = handoff.with_first_token().filter(|_| wants_first_token);
        Some(first_token.unwrap_or(handoff))
    }

    /// Handles the end of the prefill leg: its answer, a refusal, or a failure.
    pub(super) fn prefill_ended(
        &mut self,
        context: &mut RequestContext,
        end: Result<PrefillEnd, tokio::task::JoinError>,
    ) -> Step {
        context.drop_prefill();
        let end = end.unwrap_or_else(|e| match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // An aborted task never reaches this line, because the task is aborted only when its handle is
            // dropped, and a dropped handle is not polled.
            Err(e) => PrefillEnd::Failed(Fallback::PrefillDied, e.to_string()),
        });
        match end {
            PrefillEnd::Answered(prefilled) => self.prefill_answered(context, prefilled),
            // The decode engine may accept fields that this proxy does not know. And it refuses a stream in the form
            // that the client expects: with a status, or with an event in a stream.
            PrefillEnd::Refused(answer)
                if context.is_prefilling() && (self.body.has_unknown() || self.body.streams()) =>
            {
                let (why, status) = (Fallback::PrefillRefused, answer.head.status.as_u16());
                warn!(id = %context.id, prefill = self.prefill_id(), status, "prefill leg refused");
                self.app.metrics.leg_failed(Leg::Prefill(why));
                Step::Event(Event::PrefillFailed(why))
            }
            PrefillEnd::Refused(answer) => Step::Refused(answer),
            PrefillEnd::Failed(why, error) => {
                warn!(id = %context.id, prefill = self.prefill_id(), error, "prefill leg failed");
                if why == Fallback::NotPushed {
                    self.refused(context, &error);
                } else if let Some(prefill) = self.prefill_id() {
                    self.app.suspect(prefill);
                }
                self.prefill_failed(context, why)
            }
        }
    }

    /// Handles the prefill leg's answer: records its times and token counts, and checks that the sender
    /// pushes the KV.
    fn prefill_answered(&mut self, context: &mut RequestContext, prefilled: Prefilled) -> Step {
        if let Ok(prefill) = &self.pair.prefill {
            prefill.load.succeeded(self.prefill_sent.elapsed());
        }
        self.blame(Side::Prefill);
        if let Some(tokens) = prefilled.prompt_tokens {
            self.plan.counted(&self.app, tokens);
            let begun = context.progress().and_then(|progress| progress.begun_at());
            let time = begun.unwrap_or(self.prefill_sent).elapsed();
            let uncached = self
                .plan
                .uncached(self.prefill_id().unwrap_or_default(), tokens);
            self.plan.model.measured.prefilled(uncached, time);
        }
        self.prefilled = prefilled;
        match refused_by_sender(context) {
            None => Step::Event(Event::PrefillAnswered),
            Some(reason) => {
                self.refused(context, reason);
                warn!(id = %context.id, prefill = self.prefill_id(), reason, "the sender does not push the KV");
                self.app
                    .metrics
                    .leg_failed(Leg::Prefill(Fallback::NotPushed));
                Step::Event(Event::PrefillFailed(Fallback::NotPushed))
            }
        }
    }

    /// Handles the prefill timeout.
    pub(super) fn prefill_late(&mut self, context: &mut RequestContext) -> Step {
        let begun = context.progress().and_then(|progress| progress.begun_at());
        if begun.is_some() && self.handoff.is_some_and(|handoff| handoff.sends_early()) {
            // The prefill engine computes, and the sidecar pushes the KV at the same time, so the decode leg
            // can be sent.
            return Step::Event(Event::Begun);
        }
        let why = Fallback::PrefillTimeout;
        context.drop_prefill();
        if let Some(progress) = context.progress() {
            let end = PrefillEnd::Failed(why, "did not begin in time".into());
            progress.prefill_ended(PrefillNote::of(&end));
        }
        warn!(id = %context.id, prefill = self.prefill_id(), "prefill leg did not begin in time");
        self.prefill_failed(context, why)
    }

    /// Sends the prefill leg to another instance, if the failure and the number of attempts allow it. If no
    /// second attempt is possible, returns the event that the leg has failed.
    fn prefill_failed(&mut self, context: &mut RequestContext, why: Fallback) -> Step {
        self.app.metrics.leg_failed(Leg::Prefill(why));
        let Ok(prefill) = &self.pair.prefill else {
            return Step::Event(Event::PrefillFailed(why));
        };
        let is_computed = matches!(why, Fallback::NotPushed | Fallback::NotExpressible);
        let (now, breaker) = (Instant::now(), self.app.config.breaker());
        match why {
            _ if is_computed => {}
            Fallback::PrefillError => self.doubted.push((Side::Prefill, Arc::clone(prefill))),
            // The instance has shown no sign of work for any request in this time, so one timeout is enough
            // to pause the instance.
            Fallback::PrefillTimeout
                if (prefill.load.last_heard()).is_none_or(|at| at <= self.prefill_sent) =>
            {
                if prefill.load.stalled(now, breaker) {
                    warn!(
                        prefill = prefill.id,
                        "no sign of work: left alone for a while"
                    );
                }
            }
            _ => {
                if prefill.load.failed(now, breaker) {
                    warn!(
                        prefill = prefill.id,
                        "keeps failing: left alone for a while"
                    );
                }
            }
        }
        if !context.is_prefilling()
            && context
                .progress()
                .is_none_or(|progress| progress.begun_at().is_none())
        {
            // The decode leg was sent together with the prefill leg, so its engine waits for KV, and no
            // sender will report that no KV comes. Send the decode leg again, without a transfer; this does
            // not count as an attempt.
            self.decode_attempts = self.decode_attempts.saturating_sub(1);
            return Step::Event(Event::PrefillLost(why));
        }
        // Do not retry if the time is used up, or if the prompt has been computed already.
        let is_final = is_computed || why == Fallback::PrefillTimeout;
        if is_final
            || !context.is_prefilling()
            || self.prefill_attempts >= self.app.config.prefill_attempts
        {
            return Step::Event(Event::PrefillFailed(why));
        }
        self.failed.push(prefill.id.clone());
        match self.plan.route(&self.app, &self.failed) {
            Ok(pair) if pair.prefill.is_ok() => {
                self.pair = pair;
                self.app.metrics.prefill_retried();
                self.send_prefill(context);
                Step::Again
            }
            _ => Step::Event(Event::PrefillFailed(why)),
        }
    }
}

/// Returns the sender's reason, if the sender has reported that it pushes no KV or stops pushing.
fn refused_by_sender(context: &RequestContext) -> Option<&'static str> {
    let moved = context.progress()?.moved().filter(|moved| !moved.ok)?;
    Some(moved.reason.map_or("unknown", protocol::Reason::as_str))
}

impl PrefillNote {
    fn of(end: &PrefillEnd) -> Self {
        let (error, prompt_tokens) = match end {
            PrefillEnd::Answered(prefilled) => (None, prefilled.prompt_tokens),
            PrefillEnd::Refused(answer) => (Some(format!("answered {}", answer.head.status)), None),
            PrefillEnd::Failed(_, error) => (Some(error.clone()), None),
        };
        let (cached_tokens, written_tokens) = match end {
            PrefillEnd::Answered(prefilled) => (prefilled.cached_tokens, prefilled.written_tokens),
            PrefillEnd::Refused(_) | PrefillEnd::Failed(..) => (None, None),
        };
        Self {
            at: Instant::now(),
            error,
            prompt_tokens,
            cached_tokens,
            written_tokens,
        }
    }
}
