//! A request's decode legs: how they are sent, and what their end means.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use protocol::RequestId;
use tracing::warn;

use super::{Drive, Step};
use crate::endpoint::Endpoint;
use crate::flight::Flight;
use crate::handover::{Way, decode_params};
use crate::instance::Instance;
use crate::labels::Leg;
use crate::legs::{Answer, LegError};
use crate::life::Event;
use crate::lmcache;
use crate::route::Alone;
use crate::verdict::Verdict;

impl Drive {
    pub(super) fn send_decode(&mut self, flight: &mut Flight, transfer: Result<(), Alone>) {
        let decode = &self.pair.decode;
        self.decode_attempts += 1;
        let room = lmcache::max_tokens(&self.body, self.endpoint).unwrap_or(USUAL_ANSWER);
        let tokens = self.plan.tokens.saturating_add(room.min(MAX_ANSWER));
        flight.decode_sent(decode, transfer, tokens);
        self.decode_sent = Instant::now();
        self.goes_on = self.prefilled.first.is_some() && (transfer.is_ok() || self.is_early);
        decode
            .load
            .chosen(self.decode_sent, self.app.config.breaker());
        let (path, id, body) = self.decode_leg(&flight.id, transfer);
        let headers = self.leg_headers(id);
        let url = decode.http.join(path);
        let legs = self.app.legs.clone();
        self.decode = Some(Box::pin(
            async move { legs.decode(&url, headers, body).await },
        ));
    }

    /// Path, request id and body of the decode leg.
    fn decode_leg<'a>(
        &'a self,
        id: &'a RequestId,
        transfer: Result<(), Alone>,
    ) -> (&'static str, &'a RequestId, Bytes) {
        let prefilled = &self.prefilled;
        let params = match (transfer, self.way, &prefilled.params) {
            (Err(_), _, _) => None,
            (Ok(()), Way::Nixl, params) => params.clone(),
            // Nothing but the chunk hashes, or the id, says that it has a transfer.
            (Ok(()), Way::Lmcache | Way::P2pNccl, _) => None,
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
        flight: &mut Flight,
        end: Result<Answer, LegError>,
    ) -> Step {
        self.decode = None;
        let error = match end {
            Ok(answer) => return Step::FirstByte(Box::new(answer)),
            Err(error) => error,
        };
        let decode = &self.pair.decode;
        self.app.metrics.leg_failed(Leg::Decode(error.failure()));
        warn!(id = %flight.id, decode = decode.id, %error, "decode leg failed");
        if let LegError::Connect(_) | LegError::Died(_) = error {
            self.app.suspect(&decode.id);
        }
        if decode
            .load
            .failed(Instant::now(), self.app.config.breaker())
        {
            warn!(decode = decode.id, "keeps failing: left alone for a while");
        }
        // What it still computes was meant for the instance that failed.
        flight.drop_prefill();
        self.failed.push(decode.id.clone());
        let another = self.another(&error);
        if let Some(decode) = another {
            self.pair.decode = decode;
            return Step::Event(Event::DecodeFailed { another: true });
        }
        self.condemn(flight, Verdict::of(error));
        Step::Event(Event::DecodeFailed { another: false })
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

/// Most answers end long before a limit beyond this.
const MAX_ANSWER: u64 = 1024;
