//! The prefill leg of a request, in the form that its connector needs.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;
use protocol::RequestId;

use crate::connectors::first_token;
use crate::connectors::{Handoff, Legs, PrefillForm};
use crate::fleet::instance::Instance;
use crate::openai::body::{PrefillAnswer, RequestBody};
use crate::openai::endpoint::Endpoint;
use crate::openai::fallback::Fallback;
use crate::state::in_flight::Progress;
use crate::upstream::client::{Client, PrefillEnd};

/// Everything that a prefill leg needs.
#[derive(Debug)]
pub(crate) struct PrefillLeg {
    /// The HTTP client.
    pub client: Client,
    /// The endpoint that the client has called.
    pub endpoint: Endpoint,
    /// The path that the client has called.
    pub path: Cow<'static, str>,
    /// Headers of the leg.
    pub headers: HeaderMap,
    /// The client's body.
    pub body: RequestBody,
    /// The id that both legs carry.
    pub id: RequestId,
    /// The instance that gets the leg.
    pub prefill: Arc<Instance>,
    /// The instance that gets the KV.
    pub decode: Arc<Instance>,
    /// The way in which the two instances hand KV over.
    pub handoff: &'static dyn Handoff,
    /// True if the decode leg is sent before the prefill leg's answer has come.
    pub overlap: bool,
}

impl PrefillLeg {
    /// Sends the leg and waits until the decode leg can be sent.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection, so that the engine aborts the request.
    pub(crate) async fn run(mut self, progress: &Progress) -> PrefillEnd {
        let form = self.handoff.prefill_form();
        let tokens = match form {
            PrefillForm::TokenIds => match self.tokens().await {
                Ok(tokens) => Some(tokens),
                Err(end) => return end,
            },
            PrefillForm::Discarded | PrefillForm::FirstToken => None,
        };
        let params = self.handoff.prefill_params(&Legs {
            id: &self.id,
            decode: self.decode.kv_address(),
            overlap: self.overlap,
        });
        let (path, body) = self.request(form, tokens.as_deref(), params.as_deref());
        let url = self.prefill.http.join(path);
        let headers = std::mem::take(&mut self.headers);
        let sent = self.client.prefill(&url, headers, body, self.handoff);
        let end = sent.await;
        let PrefillEnd::Answered(mut prefilled) = end else {
            return end;
        };
        if tokens.is_some() {
            prefilled.tokens = tokens;
        }
        if self.handoff.needs_notices() {
            progress.noticed(self.decode.init_ports.len()).await;
        }
        PrefillEnd::Answered(prefilled)
    }

    /// Returns the path and the body of the leg. `tokens` is the prompt as token ids, in JSON; `None` if
    /// the leg carries the client's own prompt.
    fn request(
        &self,
        form: PrefillForm,
        tokens: Option<&str>,
        params: Option<&str>,
    ) -> (&str, Bytes) {
        if let Some(tokens) = tokens {
            let params = params.unwrap_or_default();
            let body = first_token::prefill_body(&self.body, tokens, params);
            return (Endpoint::Completions.path(), body);
        }
        let answer = match form {
            PrefillForm::FirstToken => PrefillAnswer::FirstToken,
            PrefillForm::Discarded | PrefillForm::TokenIds => PrefillAnswer::Nothing,
        };
        let body = self.body.prefill_leg(self.endpoint, params, answer);
        (&self.path, body)
    }

    /// Returns the prompt as token ids, in JSON: from the request itself, or from the engine's `/tokenize`.
    async fn tokens(&self) -> Result<String, PrefillEnd> {
        let Some(body) = first_token::tokenize_body(&self.body, self.endpoint) else {
            return Ok(first_token::token_ids(&self.body)
                .unwrap_or("[]")
                .to_owned());
        };
        let url = self.prefill.http.join("/tokenize");
        let answer = self.client.ask(&url, self.headers.clone(), body).await;
        let answer =
            answer.map_err(|e| PrefillEnd::Failed(Fallback::PrefillDied, e.to_string()))?;
        if answer.head.status.is_client_error() {
            return Err(PrefillEnd::Refused(Box::new(answer)));
        }
        let tokens = first_token::tokens(&answer.held);
        tokens.ok_or_else(|| {
            let text = format!("/tokenize answered {} without tokens", answer.head.status);
            PrefillEnd::Failed(Fallback::PrefillError, text)
        })
    }
}
