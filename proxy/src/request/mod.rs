//! Drives a request through its states: sends the legs, handles the events, and answers the client.

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
pub(crate) mod stored;

use std::borrow::Cow;
use std::future::{Future, pending};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, Method};
use protocol::RequestId;
use tokio::select;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::sleep_until;

use crate::config::cli::DecodeLegAt;
use crate::connectors::Handoff;
use crate::connectors::answer::Prefilled;
use crate::fleet::instance::Instance;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;
use crate::openai::error::ApiError;
use crate::openai::fallback::Fallback;
use crate::openai::headers::{keep_content_type, leg_headers};
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

/// A request as the client has sent it.
#[derive(Debug)]
pub(crate) struct Arrival {
    /// The time of arrival.
    pub at: Instant,
    /// The endpoint that the client has called.
    pub endpoint: Endpoint,
    /// The client's method.
    pub method: Method,
    /// The client's path, with the query if an engine reads it.
    pub path: Cow<'static, str>,
    /// The id that the proxy has given the request.
    pub id: RequestId,
    /// The client's headers.
    pub headers: HeaderMap,
    /// The client's body.
    pub body: Bytes,
}

/// The future of a decode leg in flight.
type DecodeLeg = Pin<Box<dyn Future<Output = Result<Answer, LegError>> + Send>>;

/// A request that has been routed, with everything that its legs need.
struct Drive {
    app: Arc<App>,
    endpoint: Endpoint,
    method: Method,
    path: Cow<'static, str>,
    headers: HeaderMap,
    body: RequestBody,
    plan: RoutePlan,
    pair: Pair,
    /// The id that the legs carry: the request's id, unless a connector or a second attempt needs a different
    /// id.
    leg_id: RequestId,
    /// The client's own id of the request, which is a part of the answer's id; `None` if the client gave
    /// none.
    chosen: Option<RequestId>,
    /// Ids of the instances that have failed this request.
    failed: Vec<String>,
    /// Instances that have answered the request with an error. The list is kept until it is known whether the
    /// instance or the request is at fault.
    doubted: Vec<(Side, Arc<Instance>)>,
    prefill_attempts: u32,
    decode_attempts: u32,
    /// The way in which the two instances hand KV over; `None` before a prefill leg is sent.
    handoff: Option<&'static dyn Handoff>,
    /// True if `leg_id` contains the addresses of both engines, because the engines read each other's address
    /// from it.
    is_address_id: bool,
    /// The result of the prefill leg; empty until the leg is answered.
    prefilled: Prefilled,
    prefill_sent: Instant,
    decode_sent: Instant,
    /// Time of the next check whether the decode instance works.
    check_at: Instant,
    decode: Option<DecodeLeg>,
    /// True if the client has got the first token from the prefill instance.
    has_sent_first_token: bool,
    /// True if the last decode leg continues after the prefill instance's first token, instead of generating
    /// this token itself.
    is_continuation: bool,
    /// The id under which the engine may store its response; `None` if it stores none.
    stored_as: Option<String>,
    /// The error that the client gets if no decode leg succeeds.
    failure: Failure,
}

/// A side of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Prefill,
    Decode,
}

/// The result of one wait for the legs.
enum Step {
    /// An event that only changes the request's state.
    Event(Event),
    /// Another prefill instance has taken over, or nothing has changed: wait again.
    Again,
    /// The prefill engine has refused the request.
    Refused(Box<Answer>),
    /// The decode engine's answer has begun.
    FirstByte(Box<Answer>),
}

/// Serves a request: routes it, sends its legs, and returns the answer to the client.
///
/// # Errors
/// The request is malformed, or no instance can take it. In both cases no leg was sent.
///
/// # Cancel safety
/// Dropping the future, or the response's body, drops both legs.
pub(crate) async fn serve(
    app: &Arc<App>,
    permit: OwnedSemaphorePermit,
    mut arrival: Arrival,
) -> Result<Response, ApiError> {
    // Parse and route first: a request that cannot be parsed or routed gets an error before it counts as
    // arrived.
    let source = std::mem::take(&mut arrival.body);
    let mut body = match arrival.endpoint.generates() {
        true => RequestBody::parse(source)?,
        false => RequestBody::opaque(source),
    };
    arrival.endpoint = body.endpoint(arrival.endpoint);
    // A client may name its request in the body, which was not read yet when the id was assigned from the
    // headers.
    let chosen = request_id::chosen(&arrival.headers, body.json("request_id"));
    // This may add a field. It comes before routing, because a pair that refuses requests of one shape is found
    // again by the names of the fields.
    let stored_as = stored::stored_as(arrival.endpoint, &mut body)?;
    let mut plan = RoutePlan::of(app, &body, arrival.endpoint, &arrival.headers);
    let pair = match holder(app, &arrival, &body).await {
        Some(holder) => plan.pin(holder),
        None => plan.route(app, &[])?,
    };
    // Each request that gets no transfer because of its cost makes the estimated cost a little smaller. If
    // the estimate never fell, the proxy would try no further transfer after one high measurement.
    if matches!(pair.prefill, Err(Fallback::Cheaper)) {
        plan.model.measured.stayed();
    }
    if let Some(chosen) = chosen
        .as_ref()
        .filter(|_| !arrival.headers.contains_key(request_id::HEADER))
    {
        arrival.id = request_id::unique(&chosen.0);
    }
    let named = request_id::header_value(&arrival.id);
    let mut headers = leg_headers(&arrival.headers, named, &app.config.access);
    if !arrival.endpoint.generates() {
        keep_content_type(&mut headers, &arrival.headers);
    }
    let trace = app.spans.is_some().then(|| Trace::of(&arrival.headers));
    if let Some(trace) = &trace {
        trace.pass_on(&mut headers);
    }
    let (at, endpoint) = (arrival.at, arrival.endpoint);
    let (mut context, mut action) =
        RequestContext::begin(app, permit, at, endpoint, arrival.id, (&pair, &plan), trace);
    let mut drive = Drive {
        app: Arc::clone(app),
        endpoint: arrival.endpoint,
        method: arrival.method,
        path: arrival.path,
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
        handoff: None,
        is_address_id: false,
        prefilled: Prefilled::default(),
        prefill_sent: arrival.at,
        decode_sent: arrival.at,
        check_at: arrival.at,
        decode: None,
        has_sent_first_token: false,
        is_continuation: false,
        stored_as,
        failure: Failure::shutting_down(),
    };
    // With `--decode-leg arrival`, the decode leg does not wait for the prefill engine to begin.
    drive.send_prefill(&mut context);
    if action == Action::Wait
        && drive.handoff.is_some_and(|handoff| handoff.can_overlap())
        && app.config.decode_leg == DecodeLegAt::Arrival
    {
        action = context.on(Event::Begun);
    }
    Ok(drive.run(context, action).await)
}

/// Returns the instance that holds the stored response which the request names; `None` if the request names none,
/// or if no instance has the response.
async fn holder(app: &App, arrival: &Arrival, body: &RequestBody) -> Option<Arc<Instance>> {
    let id = stored::named_by(arrival.endpoint, &arrival.path, body)?;
    let named = request_id::header_value(&arrival.id);
    let headers = leg_headers(&arrival.headers, named, &app.config.access);
    stored::holder(app, &id, &headers).await
}

impl Drive {
    /// Handles events until the answer to the client begins or the request fails.
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
                Step::FirstByte(answer) => return self.answer_client(context, *answer),
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

    /// Calls `run` through a box: `run` calls this function through `first_token`, and the future of an async
    /// function cannot contain itself.
    fn go_on(
        self,
        context: RequestContext,
        action: Action,
    ) -> Pin<Box<dyn Future<Output = Response> + Send>> {
        Box::pin(self.run(context, action))
    }

    /// Answers the client with the decode leg's answer, and learns from the request.
    fn answer_client(&mut self, context: RequestContext, mut answer: Answer) -> Response {
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
            self.plan.model.measured.handed_over(end.elapsed());
        }
        if !context.waits_for_kv() && answer.rest.is_some() && self.endpoint.generates() {
            // This engine alone computed the prompt, so the time to its first event measures the prefill.
            let uncached = self.plan.uncached(&decode.id, self.plan.tokens);
            let took = self.decode_sent.elapsed();
            self.plan.model.measured.prefilled(uncached, took);
        }
        if answer.head.status.is_success() {
            self.plan
                .answered(&self.app, &self.pair, &self.body, self.endpoint);
            if let Some(id) = &self.stored_as {
                let decode = &self.pair.decode.id;
                self.app.stored_responses.remember(id, decode);
            }
        }
        if self.is_continuation
            && !self.has_sent_first_token
            && answer.head.status.is_success()
            // The answer is not streamed: put the first token before its text.
            && let (Some(merger), None) = (self.merger(), &answer.rest)
        {
            answer.held = merger.whole(&answer.held);
        }
        // Only an answer after a transfer contains fields of the transfer, which the client must not get.
        let is_moved = context.waits_for_kv() && answer.head.status.is_success();
        let mut progress = context.progress().filter(|_| is_moved);
        if answer.rest.is_none()
            && let Some(progress) = progress.take()
        {
            answer.held = mask::whole(answer.held, self.endpoint, &progress);
        }
        let force_shutdown = self.app.force_shutdown.clone();
        let limits = Silence {
            idle: self.app.config.idle_timeout,
            dead: self.app.config.stall_timeout,
            // If the proxy parses the events, it buffers each event until the event's end, so the size of an
            // event must be limited.
            max_event: if self.has_sent_first_token {
                MAX_EVENT_BYTES
            } else {
                usize::MAX
            },
        };
        let endpoint = self.endpoint;
        let response = response_body::respond(context, answer, limits, force_shutdown);
        match progress {
            Some(progress) => response.map(|body| mask::stream(body, endpoint, progress)),
            None => response,
        }
    }

    /// Waits for the next event of the request. The legs outlive this call, so a leg that has not ended is
    /// polled again by the next call.
    async fn next(&mut self, context: &mut RequestContext) -> Step {
        let prefilling = context.is_prefilling();
        // Each branch waits forever if its event cannot come now.
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
        let (is_decoding, check_at) = (self.decode.is_some(), self.check_at);
        let check = async {
            match is_decoding {
                true => sleep_until(check_at.into()).await,
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
            () = check => self.check_decode(context),
            () = self.app.force_shutdown.cancelled() => {
                self.set_failure(context, Failure::shutting_down());
                Step::Event(Event::ForceShutdown)
            }
        }
    }

    /// Returns true if the decode leg is sent before the prefill leg's answer has come.
    fn overlaps(&self) -> bool {
        self.handoff.is_some_and(|handoff| handoff.can_overlap())
            && self.app.config.decode_leg != DecodeLegAt::Answer
    }

    /// Returns the headers of a leg that carries this id.
    fn leg_headers(&self, id: &RequestId) -> HeaderMap {
        let mut headers = self.headers.clone();
        headers.insert(request_id::HEADER, request_id::header_value(id));
        headers
    }

    /// Notes the failure that the client gets.
    fn set_failure(&mut self, context: &mut RequestContext, failure: Failure) {
        let (status, text) = failure.status_and_text();
        context.failed(status, text);
        self.failure = failure;
    }

    /// Returns the id of the prefill instance; `None` if the request has none.
    fn prefill_id(&self) -> Option<&str> {
        Some(self.pair.prefill.as_ref().ok()?.id.as_str())
    }
}

/// Maximum size of an event in a stream that the proxy parses, in bytes. An event of one token is below 1
/// KiB, and these streams contain neither logprobs nor the prompt's token ids.
const MAX_EVENT_BYTES: usize = 4 * 1024 * 1024;
