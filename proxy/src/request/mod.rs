//! Drives a request through its life: sends the legs, listens to what happens, answers the client.

pub(crate) mod context;
pub(crate) mod decode_leg;
pub(crate) mod failure;
pub(crate) mod first_token;
pub(crate) mod learning;
pub(crate) mod mask;
pub(crate) mod prefill_leg;
pub(crate) mod prefill_request;
pub(crate) mod response_body;
pub(crate) mod route_plan;
pub(crate) mod state;

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

use crate::config::cli::DecodeLegAt;
use crate::connectors::handoff::{HandoffMode, Prefilled};
use crate::fleet::instance::Instance;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;
use crate::openai::error::ApiError;
use crate::openai::fallback::Fallback;
use crate::openai::headers::leg_headers;
use crate::openai::request_id;
use crate::request::context::RequestContext;
use crate::request::failure::Failure;
use crate::request::response_body::Silence;
use crate::request::route_plan::RoutePlan;
use crate::request::state::{Action, Event};
use crate::routing::Pair;
use crate::state::app::App;
use crate::telemetry::trace::Trace;
use crate::upstream::client::{Answer, LegError};

/// A request as it came.
#[derive(Debug)]
pub(crate) struct Arrival {
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
    plan: RoutePlan,
    pair: Pair,
    /// The id that the legs carry: the request's, unless a connector or a second attempt wants another.
    leg_id: RequestId,
    /// The name that the client has given the request: its answer's id carries it.
    chosen: Option<RequestId>,
    /// Instances that have failed it.
    failed: Vec<String>,
    /// Those that have answered it with an error, until it is known whether the request is at fault.
    doubted: Vec<(Side, Arc<Instance>)>,
    prefill_attempts: u32,
    decode_attempts: u32,
    /// How the pair hands KV over; meaningless without a prefill instance.
    way: HandoffMode,
    /// What the prefill leg has brought.
    prefilled: Prefilled,
    prefill_sent: Instant,
    decode_sent: Instant,
    /// When to look next whether the decode instance works.
    look_at: Instant,
    decode: Option<DecodeLeg>,
    /// The client has been given the first token.
    is_early: bool,
    /// The decode leg that was sent last goes on after the first token.
    goes_on: bool,
    /// What the client is told if no decode leg brings an answer.
    failure: Failure,
}

/// A side of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Prefill,
    Decode,
}

/// What the wait of a request ended with.
enum Step {
    /// Something that only moves its life on.
    Event(Event),
    /// Another prefill instance takes over, or the wait goes on.
    Again,
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
pub(crate) async fn serve(
    app: &Arc<App>,
    permit: OwnedSemaphorePermit,
    mut arrival: Arrival,
) -> Result<Response, ApiError> {
    let body = RequestBody::parse(arrival.body)?;
    let plan = RoutePlan::of(app, &body, arrival.endpoint, &arrival.headers);
    let pair = plan.route(app, &[])?;
    if matches!(pair.prefill, Err(Fallback::Cheaper)) {
        app.measured.stayed();
    }
    let chosen = request_id::chosen(&arrival.headers, body.json("request_id"));
    if let Some(chosen) = chosen
        .as_ref()
        .filter(|_| !arrival.headers.contains_key(request_id::HEADER))
    {
        arrival.id = request_id::unique(&chosen.0);
    }
    let named = request_id::header_value(&arrival.id);
    let mut headers = leg_headers(&arrival.headers, named, &app.config.access);
    let trace = app.spans.is_some().then(|| Trace::of(&arrival.headers));
    if let Some(trace) = &trace {
        trace.pass_on(&mut headers);
    }
    let (at, endpoint) = (arrival.at, arrival.endpoint);
    let (mut context, mut action) =
        RequestContext::begin(app, permit, at, endpoint, arrival.id, &pair, trace);
    let mut drive = Drive {
        app: Arc::clone(app),
        endpoint: arrival.endpoint,
        headers,
        body,
        plan,
        pair,
        leg_id: context.id.clone(),
        chosen,
        failed: Vec::new(),
        doubted: Vec::new(),
        prefill_attempts: 0,
        decode_attempts: 0,
        way: HandoffMode::Sidecar,
        prefilled: Prefilled::default(),
        prefill_sent: arrival.at,
        decode_sent: arrival.at,
        look_at: arrival.at,
        decode: None,
        is_early: false,
        goes_on: false,
        failure: Failure::shutting_down(),
    };
    drive.send_prefill(&mut context);
    if action == Action::Wait
        && drive.way == HandoffMode::Sidecar
        && app.config.decode_leg == DecodeLegAt::Arrival
    {
        action = context.on(Event::Begun);
    }
    Ok(drive.run(context, action).await)
}

impl Drive {
    async fn run(mut self, mut context: RequestContext, mut action: Action) -> Response {
        loop {
            if let Action::SendDecode(transfer) = action {
                if self.gives_first_token(transfer) {
                    return self.first_token(context, action);
                }
                self.send_decode(&mut context, transfer);
            }
            action = match self.next(&mut context).await {
                Step::Event(event) => context.on(event),
                Step::Again => Action::Wait,
                Step::FirstByte(answer) => return self.relay(context, *answer),
                Step::Refused(answer) if context.is_prefilling() => {
                    context.failed(answer.head.status, "refused by the prefill engine".into());
                    context.on(Event::PrefillRefused);
                    return response_body::whole(*answer, &context.id);
                }
                Step::Refused(_) => context.on(Event::PrefillRefused),
            };
            if action == Action::Fail {
                return self.failure.into_response(&context.id);
            }
        }
    }

    /// `run` with a type that it can name itself.
    fn go_on(
        self,
        context: RequestContext,
        action: Action,
    ) -> Pin<Box<dyn Future<Output = Response> + Send>> {
        Box::pin(self.run(context, action))
    }

    /// Answers the client with what the decode leg brings.
    fn relay(&mut self, context: RequestContext, mut answer: Answer) -> Response {
        if answer.head.status.is_success() {
            self.blame(Side::Decode);
        }
        let decode = &self.pair.decode;
        decode.load.succeeded(self.decode_sent.elapsed());
        self.learn(&context);
        if context.waits_for_kv()
            && let Some(end) = context
                .progress()
                .and_then(|progress| Some(progress.prefill_end()?.at))
        {
            self.app.measured.handed_over(end.elapsed());
        }
        if !context.waits_for_kv() && answer.rest.is_some() {
            // The first event of a stream comes when the prompt is computed, here by one engine.
            let uncached = self.plan.uncached(&decode.id, self.plan.tokens);
            let took = self.decode_sent.elapsed();
            self.app.measured.prefilled(uncached, took);
        }
        if answer.head.status.is_success() {
            self.plan.answered(&self.app, &self.pair);
        }
        if self.goes_on
            && !self.is_early
            && answer.head.status.is_success()
            && let (Some(stitch), None) = (self.stitch(), &answer.rest)
        {
            answer.held = stitch.whole(&answer.held);
        }
        let is_moved = context.waits_for_kv() && answer.head.status.is_success();
        let mut progress = context.progress().filter(|_| is_moved);
        if answer.rest.is_none()
            && let Some(progress) = progress.take()
        {
            answer.held = mask::whole(answer.held, &progress);
        }
        let force_shutdown = self.app.force_shutdown.clone();
        let limits = Silence {
            idle: self.app.config.idle_timeout,
            dead: self.app.config.stall_timeout,
            // Only an answer whose events are read waits for their ends.
            max_event: if self.is_early {
                MAX_EVENT_BYTES
            } else {
                usize::MAX
            },
        };
        let response = response_body::respond(context, answer, limits, force_shutdown);
        match progress {
            Some(progress) => response.map(|body| mask::stream(body, progress)),
            None => response,
        }
    }

    /// Waits for the next thing to happen. What is dropped here unfinished is polled again by the
    /// next call: both legs live in the request.
    async fn next(&mut self, context: &mut RequestContext) -> Step {
        let prefilling = context.is_prefilling();
        let sends_at_begun = prefilling && self.overlaps();
        let deadline = context.arrived() + self.app.config.prefill_timeout;
        let progress = context.progress();
        let begun = async {
            match &progress {
                Some(progress) if sends_at_begun => progress.begun().await,
                _ => pending().await,
            }
        };
        let prefill = async {
            match context.prefill_mut() {
                Some(leg) => leg.await,
                None => pending().await,
            }
        };
        let (is_decoding, look_at) = (self.decode.is_some(), self.look_at);
        let look = async {
            match is_decoding {
                true => sleep_until(look_at.into()).await,
                false => pending().await,
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
            end = prefill => self.prefill_ended(context, end),
            () = begun => {
                if let Ok(prefill) = &self.pair.prefill {
                    prefill.load.heard(Instant::now());
                }
                Step::Event(Event::Begun)
            }
            answer = decode => self.decode_ended(context, answer),
            () = sleep_until(deadline.into()), if prefilling => self.prefill_late(context),
            () = look => self.look(context),
            () = self.app.force_shutdown.cancelled() => {
                self.condemn(context, Failure::shutting_down());
                Step::Event(Event::ForceShutdown)
            }
        }
    }

    /// The decode leg does not wait for the prefill leg's answer.
    fn overlaps(&self) -> bool {
        self.way == HandoffMode::Sidecar && self.app.config.decode_leg != DecodeLegAt::Answer
    }

    fn leg_headers(&self, id: &RequestId) -> HeaderMap {
        let mut headers = self.headers.clone();
        headers.insert(request_id::HEADER, request_id::header_value(id));
        headers
    }

    fn condemn(&mut self, context: &mut RequestContext, failure: Failure) {
        let (status, text) = failure.told();
        context.failed(status, text);
        self.failure = failure;
    }

    fn prefill_id(&self) -> Option<&str> {
        Some(self.pair.prefill.as_ref().ok()?.id.as_str())
    }
}

/// An event of one token is below 1 KiB; logprobs and the prompt's token ids are in none that is read.
const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;
