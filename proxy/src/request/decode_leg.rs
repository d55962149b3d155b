//! A request's decode legs: how they are sent, and what their end means.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use protocol::RequestId;
use tracing::warn;

use super::{Drive, Side, Step};
use crate::connectors::handoff::{HandoffMode, decode_params};
use crate::connectors::lmcache;
use crate::fleet::instance::Instance;
use crate::openai::endpoint::Endpoint;
use crate::openai::fallback::Fallback;
use crate::request::context::RequestContext;
use crate::request::failure::Failure;
use crate::request::state::Event;
use crate::telemetry::labels::Leg;
use crate::upstream::client::{Answer, LegError};

impl Drive {
    pub(super) fn send_decode(
        &mut self,
        context: &mut RequestContext,
        transfer: Result<(), Fallback>,
    ) {
        let decode = &self.pair.decode;
        self.decode_attempts += 1;
        let room = lmcache::max_tokens(&self.body, self.endpoint).unwrap_or(USUAL_ANSWER);
        let tokens = self.plan.tokens.saturating_add(room.min(MAX_ANSWER));
        context.decode_sent(decode, transfer, tokens);
        self.decode_sent = Instant::now();
        self.goes_on = self.prefilled.first.is_some() && (transfer.is_ok() || self.is_early);
        decode
            .load
            .chosen(self.decode_sent, self.app.config.breaker());
        let (path, id, body) = self.decode_leg(&context.id, transfer);
        // P2P NCCL instances find each other by the id.
        let is_address = self.way == HandoffMode::P2pNccl && transfer.is_ok();
        let chosen = self.chosen.as_ref().filter(|_| !is_address);
        let headers = self.leg_headers(chosen.unwrap_or(id));
        let url = decode.http.join(path);
        let client = self.app.client.clone();
        let config = &self.app.config;
        let limit = if self.body.streams() {
            config.first_byte_timeout
        } else {
            config.answer_timeout
        };
        self.look_at = self.decode_sent + config.stall_timeout;
        self.decode = Some(Box::pin(async move {
            client.decode(&url, headers, body, limit).await
        }));
    }

    /// Path, request id and body of the decode leg.
    fn decode_leg<'a>(
        &'a self,
        id: &'a RequestId,
        transfer: Result<(), Fallback>,
    ) -> (&'static str, &'a RequestId, Bytes) {
        let prefilled = &self.prefilled;
        let params = match (transfer, self.way, &prefilled.params) {
            (Err(_), _, _) => None,
            (Ok(()), HandoffMode::Nixl, params) => params.clone(),
            // Nothing but the chunk hashes, or the id, says that it has a transfer.
            (Ok(()), HandoffMode::Lmcache | HandoffMode::P2pNccl, _) => None,
            (Ok(()), way, _) => {
                let tokens = prefilled.prompt_tokens.filter(|_| self.goes_on);
                Some(decode_params(&self.leg_id, way, tokens))
            }
        };
        let id = transfer.map_or(id, |()| &self.leg_id);
        if self.goes_on
            && let (Some(first), Some(tokens)) = (&prefilled.first, &prefilled.tokens)
        {
            let (body, params) = (&self.body, params.as_deref());
            let body = lmcache::decode_body(body, self.endpoint, tokens, first, params);
            return (Endpoint::Completions.path(), id, body);
        }
        let body = match params {
            Some(params) => self.body.decode_leg(&params),
            None => self.body.local_leg(),
        };
        (self.endpoint.path(), id, body)
    }

    pub(super) fn decode_ended(
        &mut self,
        context: &mut RequestContext,
        end: Result<Answer, LegError>,
    ) -> Step {
        self.decode = None;
        let error = match end {
            Ok(answer) => return Step::FirstByte(Box::new(answer)),
            Err(error) => error,
        };
        let decode = &self.pair.decode;
        self.app.suspect(&decode.id);
        if let LegError::Faulty(_) = error {
            self.doubted.push((Side::Decode, Arc::clone(decode)));
        } else if decode
            .load
            .failed(Instant::now(), self.app.config.breaker())
        {
            warn!(decode = decode.id, "keeps failing: left alone for a while");
        }
        if let Some(decode) = self.another(&error) {
            return self.take_over(context, decode, &error);
        }
        self.note_failed_leg(context, &error);
        self.condemn(context, Failure::of(error));
        Step::Event(Event::DecodeFailed { another: false })
    }

    fn note_failed_leg(&self, context: &mut RequestContext, error: &LegError) {
        self.app.metrics.leg_failed(Leg::Decode(error.failure()));
        warn!(id = %context.id, decode = self.pair.decode.id, %error, "decode leg failed");
        // What it still computes was meant for the instance that failed.
        context.drop_prefill();
    }

    /// Goes on with another decode instance; what is left of the leg is dropped, so that the engine
    /// aborts it.
    fn take_over(
        &mut self,
        context: &mut RequestContext,
        other: Arc<Instance>,
        error: &LegError,
    ) -> Step {
        self.note_failed_leg(context, error);
        self.decode = None;
        self.failed.push(self.pair.decode.id.clone());
        self.pair.decode = other;
        Step::Event(Event::DecodeFailed { another: true })
    }

    /// Looks whether the decode instance works while nothing of the answer has come. A sign of work is
    /// data of any of its answers: a request may wait in a queue behind others, and that queue moves.
    pub(super) fn look(&mut self, context: &mut RequestContext) -> Step {
        let (now, breaker) = (Instant::now(), self.app.config.breaker());
        let load = &self.pair.decode.load;
        self.look_at = now + breaker.stall;
        if !load.is_sick_for(now, breaker.stall) {
            if context.waits_for_kv() && context.prefill_mut().is_some() {
                return Step::Again;
            }
            let prefilled = context
                .progress()
                .and_then(|progress| Some(progress.prefill_end()?.at));
            let signs = [Some(self.decode_sent), load.last_heard(), prefilled];
            let last = signs.into_iter().flatten().max().unwrap_or(now);
            let patience = if load.snapshot(now).is_open {
                // Another request has found that it does not work.
                Some(breaker.stall)
            } else {
                self.patience()
            };
            match patience.map(|patience| last + patience) {
                Some(until) if until <= now => {}
                Some(until) => {
                    self.look_at = self.look_at.min(until);
                    return Step::Again;
                }
                None => return Step::Again,
            }
            if load.stalled(now, breaker) {
                let decode = &self.pair.decode.id;
                warn!(decode, "no sign of work: left alone for a while");
            }
        }
        let error = LegError::Silent(self.decode_sent.elapsed());
        let another = self.another(&error);
        match another.filter(|other| !other.load.snapshot(now).is_open) {
            Some(other) => self.take_over(context, other, &error),
            // Nobody else would be sooner.
            None => Step::Again,
        }
    }

    /// How long the decode instance may show no sign of work; `None` where it cannot be said, because
    /// the answer comes as a whole and has no limit.
    fn patience(&self) -> Option<Duration> {
        let config = &self.app.config;
        let prompt = self.app.measured.costs().prefill_us_per_token * self.plan.tokens as f64 / 1e6;
        let prompt = Duration::try_from_secs_f64(prompt * SLOWER).ok()?;
        let prompt = prompt.min(config.first_byte_timeout);
        let answer = if self.body.streams() {
            Duration::ZERO
        } else {
            let tokens = lmcache::max_tokens(&self.body, self.endpoint)?;
            TOKEN_TIME.checked_mul(u32::try_from(tokens).ok()?)?
        };
        Some(config.stall_timeout + prompt + answer)
    }

    /// Another instance has done what these could not: it was their fault, not the request's. A request
    /// that no engine can take says nothing about them.
    pub(super) fn blame(&mut self, side: Side) {
        let breaker = self.app.config.breaker();
        for (_, instance) in self.doubted.extract_if(.., |(doubted, _)| *doubted == side) {
            if instance.load.failed(Instant::now(), breaker) {
                warn!(id = instance.id, "keeps failing: left alone for a while");
            }
        }
    }

    /// Another decode instance, if the failure and the number of attempts allow one.
    fn another(&self, error: &LegError) -> Option<Arc<Instance>> {
        if !error.is_retryable() || self.decode_attempts >= self.app.config.decode_attempts {
            return None;
        }
        let pair = self.plan.route_alone(&self.app, &self.failed).ok()?;
        Some(pair.decode)
    }
}

/// What a request without a limit is taken to generate, for the load of its instance.
const USUAL_ANSWER: u64 = 256;

/// A prompt may take so many times what it usually takes before its instance is doubted.
const SLOWER: f64 = 10.0;

/// Of an answer that is not streamed, for each token that it may have: ten times what a busy engine takes.
const TOKEN_TIME: Duration = Duration::from_millis(500);

/// Most answers end long before a limit beyond this.
const MAX_ANSWER: u64 = 1024;
