//! What is known of a request when it is routed, and what is learned when it is answered.

use std::time::Instant;

use http::HeaderMap;

use crate::connectors::lmcache;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;
use crate::openai::fallback::Fallback;
use crate::openai::prompt_hash::{Prompt, session};
use crate::routing::policy::Policy;
use crate::routing::prefix_index::PrefixMatch;
use crate::routing::refusals::Between;
use crate::routing::{NoRoute, Pair, RouteRequest, route};
use crate::state::app::{App, Transfers, load_snapshots};

/// What is known of one request.
#[derive(Debug)]
pub(crate) struct RoutePlan {
    /// The prompt's length, as estimated.
    pub tokens: u64,
    alone: Option<Fallback>,
    /// Its answer is the same if its first token comes from the prefill instance.
    pub is_splittable: bool,
    session: Option<u64>,
    prompt: Option<Prompt>,
    known: PrefixMatch,
    /// Instances that are known to refuse it.
    refused: Vec<Between>,
}

impl RoutePlan {
    /// Reads a request as far as routing depends on it.
    pub(crate) fn of(
        app: &App,
        body: &RequestBody,
        endpoint: Endpoint,
        headers: &HeaderMap,
    ) -> Self {
        let remembers = app.remembers();
        let by_session =
            [app.config.prefill_policy, app.config.decode_policy].contains(&Policy::Session);
        let session = (remembers || by_session)
            .then(|| session(headers, body))
            .flatten();
        let prompt = remembers.then(|| Prompt::of(body, endpoint));
        let known = match &prompt {
            Some(prompt) => app.prefix_index.recall(prompt, session),
            None => PrefixMatch {
                tokens: body.len() / BYTES_PER_TOKEN,
                ..PrefixMatch::default()
            },
        };
        Self {
            tokens: known.tokens,
            alone: body.alone(endpoint),
            is_splittable: lmcache::can_express(body, endpoint),
            session,
            prompt,
            known,
            refused: app.refusals.of(Instant::now(), body, endpoint),
        }
    }

    /// Chooses a decode instance for a question that any of them can answer.
    ///
    /// # Errors
    /// None is ready.
    pub(crate) fn any(app: &App) -> Result<Pair, NoRoute> {
        let nothing = Self {
            tokens: 0,
            alone: Some(Fallback::NothingToDecode),
            is_splittable: false,
            session: None,
            prompt: None,
            known: PrefixMatch::default(),
            refused: Vec::new(),
        };
        nothing.route(app, &[])
    }

    /// Chooses its instances, without those that have failed it.
    ///
    /// # Errors
    /// No decode instance can take it.
    pub(crate) fn route(&self, app: &App, failed: &[String]) -> Result<Pair, NoRoute> {
        self.routed(app, self.alone, failed)
    }

    /// Chooses a decode instance that computes everything itself.
    ///
    /// # Errors
    /// No decode instance can take it.
    pub(crate) fn route_alone(&self, app: &App, failed: &[String]) -> Result<Pair, NoRoute> {
        self.routed(app, Some(Fallback::DecodeRetry), failed)
    }

    fn routed(
        &self,
        app: &App,
        alone: Option<Fallback>,
        failed: &[String],
    ) -> Result<Pair, NoRoute> {
        let transfers = if alone.is_none() {
            Transfers::Yes
        } else {
            Transfers::No
        };
        let (prefill, decode) = app.next_turn(transfers);
        let instances = app.instances();
        let conversation = self.known.conversation.as_ref();
        let ask = RouteRequest {
            alone,
            is_unsplittable: !self.is_splittable,
            prefill,
            decode,
            mode: app.mode.get(),
            costs: app.measured.costs(),
            session: self.session,
            prompt_tokens: self.tokens,
            held: &self.known.held,
            conversation: conversation.map(|(_, conversation)| conversation.decode.as_str()),
            failed,
            refused: &self.refused,
        };
        route(&instances, &load_snapshots(&instances), &ask)
    }

    /// The prefill engine has counted the prompt's tokens.
    pub(crate) fn counted(&self, app: &App, tokens: u64) {
        if let Some(prompt) = &self.prompt {
            app.prefix_index.measured(prompt.text.len(), tokens);
        }
    }

    /// Of so many tokens, those that an instance is not known to hold.
    pub(crate) fn uncached(&self, name: &str, tokens: u64) -> u64 {
        let held = self.known.held.iter().find(|(holder, _)| holder == name);
        tokens.saturating_sub(held.map_or(0, |(_, tokens)| *tokens))
    }

    /// These instances have answered it: they hold its prompt from now on.
    pub(crate) fn answered(&self, app: &App, pair: &Pair) {
        let Some(prompt) = &self.prompt else {
            return;
        };
        let decode = pair.decode.id.as_str();
        let prefill = pair
            .prefill
            .as_ref()
            .ok()
            .map(|prefill| prefill.id.as_str());
        app.prefix_index
            .learn(prompt, std::iter::once(decode).chain(prefill));
        let key = self.known.conversation.as_ref().map(|(key, _)| *key);
        app.prefix_index
            .turn(Instant::now(), prompt, self.session, key, decode);
    }
}

/// Of English text; for the load of instances, where nothing better is known.
const BYTES_PER_TOKEN: u64 = 4;
