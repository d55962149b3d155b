//! Sends a request's decode legs, and handles their ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use protocol::RequestId;
use tracing::warn;

use super::{Drive, Side, Step};
use crate::connectors::first_token;
use crate::fleet::instance::Instance;
use crate::fleet::load::DEAD_LOOK;
use crate::openai::endpoint::Endpoint;
use crate::openai::fallback::Fallback;
use crate::request::context::RequestContext;
use crate::request::failure::Failure;
use crate::request::state::Event;
use crate::telemetry::labels::Leg;
use crate::upstream::client::{Answer, LegError};

impl Drive {
    /// Sends the decode leg to the current decode instance, with or without a transfer.
    pub(super) fn send_decode(
        &mut self,
        context: &mut RequestContext,
        transfer: Result<(), Fallback>,
    ) {
        let decode = &self.pair.decode;
        self.decode_attempts += 1;
        let room = match self.endpoint.generates() {
            true => self.body.max_tokens(self.endpoint).unwrap_or(USUAL_ANSWER),
            false => 0,
        };
        let tokens = self.plan.tokens.saturating_add(room.min(MAX_ANSWER));
        context.decode_sent(decode, transfer, tokens);
        self.decode_sent = Instant::now();
        // If the client has already got the first token, every decode leg must continue after this token,
        // even a decode leg without a transfer.
        self.is_continuation =
            self.prefilled.first.is_some() && (transfer.is_ok() || self.has_sent_first_token);
        decode
            .load
            .chosen(self.decode_sent, self.app.config.breaker());
        let (path, id, body) = self.decode_leg(&context.id, transfer);
        // If the engines read each other's addresses from the id, the leg must carry this id, and not the
        // client's own id.
        let is_address = self.is_address_id && transfer.is_ok();
        let chosen = self.chosen.as_ref().filter(|_| !is_address);
        let headers = self.leg_headers(chosen.unwrap_or(id));
        let url = decode.http.join(path);
        let method = self.method.clone();
        let client = self.app.client.clone();
        let config = &self.app.config;
        let limit = if self.endpoint.is_probe() {
            PROBE_TIMEOUT
        } else if self.body.streams() {
            config.first_byte_timeout
        } else {
            config.answer_timeout
        };
        // The client must not wait for a dead engine until `limit`, so check earlier whether the instance
        // works.
        self.check_at = self.decode_sent + config.stall_timeout.min(DEAD_LOOK);
        self.decode = Some(Box::pin(async move {
            client.decode(method, &url, headers, body, limit).await
        }));
    }

    /// Returns the path, the request id and the body of the decode leg.
    fn decode_leg<'a>(
        &'a self,
        id: &'a RequestId,
        transfer: Result<(), Fallback>,
    ) -> (&'a str, &'a RequestId, Bytes) {
        let prefilled = &self.prefilled;
        let handoff = self.handoff.filter(|_| transfer.is_ok());
        let params = handoff.and_then(|handoff| handoff.decode_params(&self.leg_id, prefilled));
        let id = transfer.map_or(id, |()| &self.leg_id);
        if self.is_continuation
            && let (Some(first), Some(tokens)) = (&prefilled.first, &prefilled.tokens)
        {
            let (body, params) = (&self.body, params.as_deref());
            let body = first_token::decode_body(body, self.endpoint, tokens, first, params);
            return (Endpoint::Completions.path(), id, body);
        }
        let body = match params {
            Some(params) => self.body.decode_leg(&params),
            None => self.body.local_leg(),
        };
        (&self.path, id, body)
    }

    /// Handles the start of the decode leg's answer, or the leg's failure. After a failure, another instance
    /// takes over if possible.
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
        self.set_failure(context, Failure::of(error));
        Step::Event(Event::DecodeFailed { another: false })
    }

    /// Counts and logs a failed decode leg, and drops the prefill leg.
    fn note_failed_leg(&self, context: &mut RequestContext, error: &LegError) {
        self.app.metrics.leg_failed(Leg::Decode(error.failure()));
        warn!(id = %context.id, decode = self.pair.decode.id, %error, "decode leg failed");
        // The prefill leg's KV goes to the instance that has failed, so the rest of the prefill leg is
        // useless.
        context.drop_prefill();
    }

    /// Switches to another decode instance. The failed leg is dropped, so that its engine aborts the request.
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

    /// Checks, before the answer begins, whether the decode instance still works. Data of any request's
    /// answer from the instance counts as a sign of work, because this request may be waiting in the engine's
    /// queue behind other requests.
    pub(super) fn check_decode(&mut self, context: &mut RequestContext) -> Step {
        let (now, breaker) = (Instant::now(), self.app.config.breaker());
        let load = &self.pair.decode.load;
        self.check_at = now + breaker.stall.min(DEAD_LOOK);
        if !load.is_dead(now, self.decode_sent, breaker.stall) {
            if context.waits_for_kv() && context.prefill_mut().is_some() {
                return Step::Again;
            }
            let prefilled = context
                .progress()
                .and_then(|progress| Some(progress.prefill_end()?.at));
            let signs = [Some(self.decode_sent), load.last_heard(), prefilled];
            let last = signs.into_iter().flatten().max().unwrap_or(now);
            let limit = if load.snapshot(now).is_open {
                // Another request has already found that the instance does not work, so this request need not
                // wait longer.
                Some(breaker.stall)
            } else {
                self.silence_limit()
            };
            match limit.map(|limit| last + limit) {
                Some(until) if until <= now => {}
                Some(until) => {
                    self.check_at = self.check_at.min(until);
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
            // No other working instance is left, so the request continues to wait.
            None => Step::Again,
        }
    }

    /// Returns the longest time for which the decode instance may show no sign of work. Returns `None` if
    /// there is no bound, because the answer is not streamed and its length is not limited.
    fn silence_limit(&self) -> Option<Duration> {
        let config = &self.app.config;
        let costs = self.plan.model.measured.costs();
        let prompt = costs.prefill_us_per_token * self.plan.tokens as f64 / 1e6;
        let prompt = Duration::try_from_secs_f64(prompt * SLOWER).ok()?;
        let prompt = prompt.min(config.first_byte_timeout);
        let answer = if self.body.streams() {
            Duration::ZERO
        } else {
            let tokens = self.body.max_tokens(self.endpoint)?;
            TOKEN_TIME.checked_mul(u32::try_from(tokens).ok()?)?
        };
        Some(config.stall_timeout + prompt + answer)
    }

    /// Counts a failure against each instance of this side that has answered the request with an error. The
    /// caller calls this function after another instance has succeeded: only then is it certain that the
    /// request did not cause the errors.
    pub(super) fn blame(&mut self, side: Side) {
        let breaker = self.app.config.breaker();
        for (_, instance) in self.doubted.extract_if(.., |(doubted, _)| *doubted == side) {
            if instance.load.failed(Instant::now(), breaker) {
                warn!(id = instance.id, "keeps failing: left alone for a while");
            }
        }
    }

    /// Returns a decode instance other than the current instance, if the failure and the number of attempts
    /// allow another leg.
    fn another(&self, error: &LegError) -> Option<Arc<Instance>> {
        if !error.is_retryable() || self.decode_attempts >= self.app.config.decode_attempts {
            return None;
        }
        // The policy may choose the current instance again, so exclude this instance by its id.
        let mut failed = self.failed.clone();
        failed.push(self.pair.decode.id.clone());
        let pair = self.plan.route_decode(&self.app, &failed).ok()?;
        Some(pair.decode)
    }
}

/// Longest wait for the answer to a probe, which needs no computation.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// Number of tokens that a request without a token limit is expected to generate. The load of the request's
/// instance contains this number.
const USUAL_ANSWER: u64 = 256;

/// Factor by which the prefill of a prompt may take longer than usual before its instance counts as stalled.
const SLOWER: f64 = 10.0;

/// Time allowed per token of an answer that is not streamed: ten times the time that a busy engine takes.
const TOKEN_TIME: Duration = Duration::from_millis(500);

/// Maximum number of generated tokens that a request adds to the load of its instance. Most answers are far
/// shorter than the large limits that clients set.
const MAX_ANSWER: u64 = 1024;
