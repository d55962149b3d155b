//! Drives a request through its life: sends the legs, listens to what happens, answers the client.

use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use axum::response::Response;
use bytes::Bytes;
use http::HeaderMap;
use protocol::RequestId;
use tokio::select;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::sleep_until;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use crate::app::{App, Transfers};
use crate::body::{Endpoint, RequestBody};
use crate::error::ApiError;
use crate::flight::Flight;
use crate::headers::leg_headers;
use crate::id;
use crate::inflight::PrefillNote;
use crate::instance::Instance;
use crate::labels::Leg;
use crate::legs::{Answer, LegError, PrefillEnd};
use crate::life::{Action, Event};
use crate::relay;
use crate::route::{Alone, Ask, Pair, route};
use crate::verdict::Verdict;

/// A request as it came.
#[derive(Debug)]
pub struct Arrival {
    /// When.
    pub at: Instant,
    /// Where.
    pub endpoint: Endpoint,
    /// Its id, from here on.
    pub id: RequestId,
    /// The client's headers.
    pub headers: HeaderMap,
    /// The client's body.
    pub body: Bytes,
}

/// A decode leg under way.
type DecodeLeg = Pin<Box<dyn Future<Output = Result<Answer, LegError>> + Send>>;

/// A request that has been routed, with what its legs are made of.
struct Drive {
    app: Arc<App>,
    endpoint: Endpoint,
    headers: HeaderMap,
    body: RequestBody,
    pair: Pair,
    /// Decode instances that have failed it.
    failed: Vec<String>,
    decode: Option<DecodeLeg>,
    /// What the client is told if no decode leg brings an answer.
    verdict: Verdict,
}

/// What the wait of a request ended with.
enum Step {
    /// Something that only moves its life on.
    Event(Event),
    /// The prefill engine's refusal.
    Refused(Box<Answer>),
    /// The decode engine's answer.
    FirstByte(Box<Answer>),
}

/// Answers a request.
///
/// # Errors
/// No leg was sent.
///
/// # Cancel safety
/// Dropping the future, or the response's body, drops both legs.
pub async fn serve(
    app: &Arc<App>,
    permit: OwnedSemaphorePermit,
    arrival: Arrival,
) -> Result<Response, ApiError> {
    let body = RequestBody::parse(&arrival.body)?;
    let alone = body.alone(arrival.endpoint);
    let transfers = if alone.is_none() {
        Transfers::Yes
    } else {
        Transfers::No
    };
    let ask = Ask {
        alone,
        policy: app.next_turn(transfers),
        failed: &[],
    };
    let pair = route(&app.instances(), &ask)?;
    let headers = leg_headers(&arrival.headers, id::header_value(&arrival.id));
    let (flight, action) =
        Flight::begin(app, permit, arrival.at, arrival.endpoint, arrival.id, &pair);
    let drive = Drive {
        app: Arc::clone(app),
        endpoint: arrival.endpoint,
        headers,
        body,
        pair,
        failed: Vec::new(),
        decode: None,
        verdict: Verdict::shutting_down(),
    };
    Ok(drive.run(flight, action).await)
}

impl Drive {
    async fn run(mut self, mut flight: Flight, mut action: Action) -> Response {
        self.send_prefill(&mut flight);
        loop {
            if let Action::SendDecode(transfer) = action {
                self.send_decode(&mut flight, transfer);
            }
            action = match self.next(&mut flight).await {
                Step::Event(event) => flight.on(event),
                Step::FirstByte(answer) => {
                    let cut = self.app.cut.clone();
                    return relay::respond(flight, *answer, self.app.config.idle_timeout, cut);
                }
                Step::Refused(answer) if flight.is_prefilling() => {
                    flight.failed(answer.head.status, "refused by the prefill engine".into());
                    flight.on(Event::PrefillRefused);
                    return relay::whole(*answer, &flight.id);
                }
                Step::Refused(_) => flight.on(Event::PrefillRefused),
            };
            if action == Action::Fail {
                return self.verdict.into_response(&flight.id);
            }
        }
    }

    /// Waits for the next thing to happen. What is dropped here unfinished is polled again by the
    /// next call: both legs live in the request.
    async fn next(&mut self, flight: &mut Flight) -> Step {
        let prefilling = flight.is_prefilling();
        let deadline = flight.arrived() + self.app.config.prefill_timeout;
        let watch = flight.watch();
        let begun = async {
            match &watch {
                Some(watch) if prefilling => watch.begun().await,
                _ => pending().await,
            }
        };
        let prefill = async {
            match flight.prefill_mut() {
                Some(leg) => leg.await,
                None => pending().await,
            }
        };
        let decode = async {
            match &mut self.decode {
                Some(leg) => leg.await,
                None => pending().await,
            }
        };
        select! {
            biased;
            end = prefill => self.prefill_ended(flight, end),
            () = begun => Step::Event(Event::Begun),
            answer = decode => self.decode_ended(flight, answer),
            () = sleep_until(deadline.into()), if prefilling => self.prefill_late(flight),
            () = self.app.cut.cancelled() => {
                self.condemn(flight, Verdict::shutting_down());
                Step::Event(Event::CutOff)
            }
        }
    }

    fn send_prefill(&self, flight: &mut Flight) {
        let (Ok(prefill), Some(watch)) = (&self.pair.prefill, flight.watch()) else {
            return;
        };
        let url = prefill.http.join(self.endpoint.path());
        let body = self
            .body
            .prefill_leg(self.endpoint, &flight.id, &self.pair.decode);
        let headers = self.headers.clone();
        let legs = self.app.legs.clone();
        let task = tokio::spawn(async move {
            let end = legs.prefill(&url, headers, body).await;
            watch.prefill_ended(PrefillNote::of(&end));
            end
        });
        flight.set_prefill(AbortOnDropHandle::new(task));
    }

    fn send_decode(&mut self, flight: &mut Flight, transfer: Result<(), Alone>) {
        let decode = &self.pair.decode;
        flight.decode_sent(&decode.id, transfer);
        let url = decode.http.join(self.endpoint.path());
        let body = match transfer {
            Ok(()) => self.body.decode_leg(&flight.id),
            Err(_) => self.body.local_leg(),
        };
        let headers = self.headers.clone();
        let legs = self.app.legs.clone();
        self.decode = Some(Box::pin(
            async move { legs.decode(&url, headers, body).await },
        ));
    }

    fn prefill_ended(
        &self,
        flight: &mut Flight,
        end: Result<PrefillEnd, tokio::task::JoinError>,
    ) -> Step {
        flight.drop_prefill();
        let end = end.unwrap_or_else(|e| match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Aborted only by dropping the handle, which is then not polled any more.
            Err(e) => PrefillEnd::Failed(Alone::PrefillDied, e.to_string()),
        });
        match end {
            PrefillEnd::Answered(_) => match refused_by_sender(flight) {
                None => Step::Event(Event::PrefillAnswered),
                Some(reason) => {
                    let why = Alone::NotPushed;
                    self.app.metrics.leg_failed(Leg::Prefill(why));
                    warn!(id = %flight.id, prefill = self.prefill_id(), reason, "not pushed");
                    Step::Event(Event::PrefillFailed(why))
                }
            },
            PrefillEnd::Refused(answer) => Step::Refused(answer),
            PrefillEnd::Failed(why, error) => {
                self.app.metrics.leg_failed(Leg::Prefill(why));
                warn!(id = %flight.id, prefill = self.prefill_id(), error, "prefill leg failed");
                if let (Alone::PrefillDied, Some(prefill)) = (why, self.prefill_id()) {
                    self.app.suspect(prefill);
                }
                Step::Event(Event::PrefillFailed(why))
            }
        }
    }

    fn prefill_late(&self, flight: &mut Flight) -> Step {
        let why = Alone::PrefillTimeout;
        flight.drop_prefill();
        if let Some(watch) = flight.watch() {
            let end = PrefillEnd::Failed(why, "did not begin in time".into());
            watch.prefill_ended(PrefillNote::of(&end));
        }
        self.app.metrics.leg_failed(Leg::Prefill(why));
        warn!(id = %flight.id, prefill = self.prefill_id(), "prefill leg did not begin in time");
        Step::Event(Event::PrefillFailed(why))
    }

    fn decode_ended(&mut self, flight: &mut Flight, end: Result<Answer, LegError>) -> Step {
        self.decode = None;
        let error = match end {
            Ok(answer) => return Step::FirstByte(Box::new(answer)),
            Err(error) => error,
        };
        self.app.metrics.leg_failed(Leg::Decode(error.failure()));
        warn!(id = %flight.id, decode = self.pair.decode.id, %error, "decode leg failed");
        if let LegError::Connect(_) | LegError::Died(_) = error {
            self.app.suspect(&self.pair.decode.id);
        }
        // What it still computes was meant for the instance that failed.
        flight.drop_prefill();
        self.failed.push(self.pair.decode.id.clone());
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
        let attempts = u32::try_from(self.failed.len()).unwrap_or(u32::MAX);
        if !error.is_retryable() || attempts >= self.app.config.decode_attempts {
            return None;
        }
        let ask = Ask {
            alone: Some(Alone::DecodeRetry),
            policy: self.app.next_turn(Transfers::No),
            failed: &self.failed,
        };
        Some(route(&self.app.instances(), &ask).ok()?.decode)
    }

    fn condemn(&mut self, flight: &mut Flight, verdict: Verdict) {
        let (status, text) = verdict.told();
        flight.failed(status, text);
        self.verdict = verdict;
    }

    fn prefill_id(&self) -> Option<&str> {
        Some(self.pair.prefill.as_ref().ok()?.id.as_str())
    }
}

/// The sender's reason, if it has said that nothing (more) is pushed.
fn refused_by_sender(flight: &Flight) -> Option<&'static str> {
    let moved = flight.watch()?.moved().filter(|moved| !moved.ok)?;
    Some(moved.reason.map_or("unknown", protocol::Reason::as_str))
}

impl PrefillNote {
    fn of(end: &PrefillEnd) -> Self {
        let (error, prompt_tokens) = match end {
            PrefillEnd::Answered(tokens) => (None, *tokens),
            PrefillEnd::Refused(answer) => (Some(format!("answered {}", answer.head.status)), None),
            PrefillEnd::Failed(_, error) => (Some(error.clone()), None),
        };
        Self {
            at: Instant::now(),
            error,
            prompt_tokens,
        }
    }
}
