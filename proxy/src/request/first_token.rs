//! Answers whose first token comes from the prefill instance.

use axum::response::Response;

use super::Drive;
use crate::connectors::first_token::merge::Merger;
use crate::connectors::first_token::stream;
use crate::openai::fallback::Fallback;
use crate::request::context::RequestContext;
use crate::request::state::{Action, Event};

impl Drive {
    /// Returns true if the prefill instance has sampled a first token that the client can get now: the answer
    /// is streamed, or this token ends the answer.
    pub(super) fn gives_first_token(&self, transfer: Result<(), Fallback>) -> bool {
        let Some(first) = &self.prefilled.first else {
            return false;
        };
        let is_last = first
            .finish_reason
            .as_deref()
            .is_some_and(|why| why != "length");
        transfer.is_ok() && !self.has_sent_first_token && (is_last || self.body.streams())
    }

    /// Answers with the first token, followed by the decode leg's answer.
    pub(super) fn first_token(mut self, mut context: RequestContext, action: Action) -> Response {
        self.has_sent_first_token = true;
        let Some(merger) = self.merger() else {
            return self.failure.into_response(&context.id);
        };
        let streams = self.body.streams();
        context.first_byte(http::StatusCode::OK, streams);
        let first = self.prefilled.first.as_ref();
        let reason = first.and_then(|first| first.finish_reason.as_deref());
        if reason.is_some_and(|why| why != "length") {
            context.on(Event::FirstByte);
            context.on(Event::AnswerEnded);
            return stream::only(&merger, streams, self.prefilled.prompt_tokens, &context.id);
        }
        let id = context.id.clone();
        stream::respond(merger, &id, self.go_on(context, action))
    }

    /// Returns the merger that puts the first token before the decode leg's answer. Returns `None` if the
    /// prefill leg has given no token.
    pub(super) fn merger(&self) -> Option<Merger> {
        let first = self.prefilled.first.clone()?;
        let model = self.body.json("model");
        let id = self.chosen.as_ref().unwrap_or(&self.leg_id);
        Some(Merger::new(self.endpoint, &id.0, model, first))
    }
}
