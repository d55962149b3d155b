//! The prefill leg of a request, in the form that its connector needs.

use std::sync::Arc;

use http::HeaderMap;
use protocol::RequestId;

use crate::connectors::handoff::{HandoffMode, prefill_params};
use crate::connectors::lmcache;
use crate::fleet::instance::Instance;
use crate::openai::body::RequestBody;
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
    /// The way in which the pair hands KV over.
    pub way: HandoffMode,
    /// True if the decode leg is sent before the prefill leg's answer has come.
    pub overlap: bool,
}

impl PrefillLeg {
    /// Sends the leg and waits until the decode leg can be sent.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection, so that the engine aborts the request.
    pub(crate) async fn run(self, progress: &Progress) -> PrefillEnd {
        if self.way == HandoffMode::Lmcache {
            return self.lmcache(progress).await;
        }
        let params = prefill_params(&self.id, self.way, &self.decode, self.overlap);
        let body =
            self.body
                .prefill_leg(self.endpoint, params.as_deref(), self.way.prefill_answer());
        let url = self.prefill.http.join(self.endpoint.path());
        let end = self
            .client
            .prefill(&url, self.headers, body, self.way)
            .await;
        if self.way == HandoffMode::FromLmcache && matches!(end, PrefillEnd::Answered(_)) {
            progress.noticed(self.decode.init_ports.len()).await;
        }
        end
    }

    async fn lmcache(mut self, progress: &Progress) -> PrefillEnd {
        let tokens = match self.tokens().await {
            Ok(tokens) => tokens,
            Err(end) => return end,
        };
        let params = prefill_params(&self.id, self.way, &self.decode, false).unwrap_or_default();
        let body = lmcache::prefill_body(&self.body, &tokens, &params);
        let url = self.prefill.http.join(Endpoint::Completions.path());
        let headers = std::mem::take(&mut self.headers);
        let end = self.client.prefill(&url, headers, body, self.way).await;
        let PrefillEnd::Answered(mut prefilled) = end else {
            return end;
        };
        prefilled.tokens = Some(tokens);
        // Each rank of the prefill instance sends a notice when it has written its part. The KV is complete
        // only then.
        progress.noticed(self.decode.init_ports.len()).await;
        PrefillEnd::Answered(prefilled)
    }

    /// Returns the prompt as token ids, in JSON: from the request itself, or from the engine's `/tokenize`.
    async fn tokens(&self) -> Result<String, PrefillEnd> {
        let Some(body) = lmcache::tokenize_body(&self.body, self.endpoint) else {
            return Ok(lmcache::token_ids(&self.body).unwrap_or("[]").to_owned());
        };
        let url = self.prefill.http.join("/tokenize");
        let answer = self.client.ask(&url, self.headers.clone(), body).await;
        let answer =
            answer.map_err(|e| PrefillEnd::Failed(Fallback::PrefillDied, e.to_string()))?;
        if answer.head.status.is_client_error() {
            return Err(PrefillEnd::Refused(Box::new(answer)));
        }
        let tokens = lmcache::tokens(&answer.held);
        tokens.ok_or_else(|| {
            let text = format!("/tokenize answered {} without tokens", answer.head.status);
            PrefillEnd::Failed(Fallback::PrefillError, text)
        })
    }
}
