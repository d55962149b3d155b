//! The facts about a request on which routing depends, and the facts that routing learns when the request is
//! answered.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use http::HeaderMap;

use crate::connectors::first_token;
use crate::fleet::instance::Instance;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;
use crate::openai::fallback::Fallback;
use crate::openai::model;
use crate::openai::prompt_hash::{Prompt, session};
use crate::routing::kv_index::Asked;
use crate::routing::models::{ModelState, Transfers};
use crate::routing::policy::Policy;
use crate::routing::prefix_index::PrefixMatch;
use crate::routing::refusals::Between;
use crate::routing::{Decision, NoRoute, Pair, RouteRequest, route};
use crate::state::app::{App, load_snapshots};
use crate::state::tokenise::Question;

/// The facts about one request on which routing depends.
#[derive(Debug)]
pub(crate) struct RoutePlan {
    /// The estimated length of the prompt, in tokens.
    pub tokens: u64,
    /// The state of the request's model.
    pub model: Arc<ModelState>,
    /// The model or adapter that the request names; `None` if it names none.
    named: Option<String>,
    fallback: Option<Fallback>,
    /// True if the answer stays the same when its first token comes from the prefill instance.
    pub is_splittable: bool,
    is_salted: bool,
    sidecars_only: Option<Fallback>,
    is_other_endpoint: bool,
    session: Option<u64>,
    prompt: Option<Prompt>,
    /// False if the tokens of the prompt are asked for after the answer.
    is_tokenised: bool,
    known: PrefixMatch,
    /// True if only one instance can serve the request, because it holds a stored response.
    is_pinned: bool,
    /// Pairs that are known to refuse requests of this kind.
    refused: Vec<Between>,
}

impl RoutePlan {
    /// Reads the facts from a request.
    pub(crate) fn of(
        app: &App,
        body: &RequestBody,
        endpoint: Endpoint,
        headers: &HeaderMap,
    ) -> Self {
        let named = match endpoint.generates() {
            true => body
                .json("model")
                .and_then(model::name)
                .map(Cow::into_owned),
            false => model::of_opaque(headers, body.bytes()),
        };
        let model = app.models.of(named.as_deref());
        if let Endpoint::Passed(passed) = endpoint {
            return Self::whole(
                (named, model),
                Fallback::PassedOn,
                match passed.is_generating() {
                    true => body.len() / BYTES_PER_TOKEN,
                    false => 0,
                },
            );
        }
        let remembers = model.remembers();
        let by_session = model.policies().into_iter().any(Policy::reads_sessions);
        let session = (remembers || by_session)
            .then(|| session(headers, body))
            .flatten();
        let prompt = remembers.then(|| Prompt::of(body, endpoint));
        let mut is_tokenised = true;
        let known = match &prompt {
            Some(prompt) => {
                let mut known = app.prefix_index.recall(prompt, session);
                if app.kv_index.is_used() {
                    is_tokenised = refine(app, &mut known, prompt, body, named.as_deref());
                }
                known
            }
            None => PrefixMatch {
                tokens: body.len() / BYTES_PER_TOKEN,
                ..PrefixMatch::default()
            },
        };
        Self {
            model,
            named,
            tokens: known.tokens,
            fallback: body.fallback(endpoint),
            is_splittable: first_token::can_express(body, endpoint),
            is_salted: body.is_salted(),
            sidecars_only: body.sidecars_only(endpoint),
            is_other_endpoint: !matches!(endpoint, Endpoint::Completions | Endpoint::Chat),
            session,
            prompt,
            is_tokenised,
            known,
            is_pinned: false,
            refused: app.refusals.of(Instant::now(), body, endpoint),
        }
    }

    /// Returns the plan of a session, which one decode instance serves alone.
    pub(crate) fn of_session(app: &App, named: Option<String>) -> Self {
        let model = app.models.of(named.as_deref());
        Self::whole((named, model), Fallback::PassedOn, 0)
    }

    /// Returns the plan of a request that one decode instance serves alone. `tokens` is the estimated length of
    /// its prompts.
    fn whole(
        (named, model): (Option<String>, Arc<ModelState>),
        fallback: Fallback,
        tokens: u64,
    ) -> Self {
        Self {
            model,
            named,
            tokens,
            fallback: Some(fallback),
            is_splittable: false,
            is_salted: false,
            sidecars_only: None,
            is_other_endpoint: false,
            session: None,
            prompt: None,
            is_tokenised: true,
            known: PrefixMatch::default(),
            is_pinned: false,
            refused: Vec::new(),
        }
    }

    /// Chooses the instances of the request. Excludes the instances in `failed`.
    ///
    /// # Errors
    /// No decode instance can take the request.
    pub(crate) fn route(&self, app: &App, failed: &[String]) -> Result<Pair, NoRoute> {
        self.routed(app, self.fallback, failed)
    }

    /// Chooses the instance that holds the stored response which the request names. From now on, no other
    /// instance can take over.
    pub(crate) fn pin(&mut self, holder: Arc<Instance>) -> Pair {
        self.is_pinned = true;
        let [prefill, decode] = self.model.policies();
        Pair {
            decode: holder,
            prefill: Err(self.fallback.unwrap_or(Fallback::StoredResponse)),
            choice: Decision {
                prefills: 0,
                decodes: 1,
                prefill,
                decode,
                mode: self.model.mode.get(),
                follows: true,
            },
        }
    }

    /// Chooses a decode instance that computes the whole request alone.
    ///
    /// # Errors
    /// No decode instance can take the request.
    pub(crate) fn route_decode(&self, app: &App, failed: &[String]) -> Result<Pair, NoRoute> {
        if self.is_pinned {
            return Err(NoRoute::AllFailed);
        }
        self.routed(app, Some(Fallback::DecodeRetry), failed)
    }

    fn routed(
        &self,
        app: &App,
        fallback: Option<Fallback>,
        failed: &[String],
    ) -> Result<Pair, NoRoute> {
        let transfers = if fallback.is_none() {
            Transfers::Yes
        } else {
            Transfers::No
        };
        let (prefill, decode) = self.model.next_turn(transfers);
        let instances = app.instances();
        let conversation = self.known.conversation.as_ref();
        let ask = RouteRequest {
            model: self.named.as_deref(),
            fallback,
            is_unsplittable: !self.is_splittable,
            is_salted: self.is_salted,
            sidecars_only: self.sidecars_only,
            is_other_endpoint: self.is_other_endpoint,
            prefill,
            decode,
            mode: self.model.mode.get(),
            costs: self.model.measured.costs(),
            session: self.session,
            prompt_tokens: self.tokens,
            held: &self.known.held,
            conversation: conversation.map(|(_, conversation)| conversation.decode.as_str()),
            failed,
            refused: &self.refused,
        };
        route(&instances, &load_snapshots(&instances), &ask)
    }

    /// Notes the number of tokens that the prefill engine has counted, so that later estimates are better.
    pub(crate) fn counted(&self, app: &App, tokens: u64) {
        if let Some(prompt) = &self.prompt {
            app.prefix_index.measured(prompt.text.len(), tokens);
        }
    }

    /// Returns the number of prompt tokens that the instance probably has to compute: all tokens that are not
    /// known to be in its cache.
    pub(crate) fn uncached(&self, name: &str, tokens: u64) -> u64 {
        let held = self.known.held.iter().find(|(holder, _)| holder == name);
        tokens.saturating_sub(held.map_or(0, |(_, tokens)| *tokens))
    }

    /// Returns the number of the prompt's tokens that the instance is expected to hold; `None` if routing does not
    /// depend on it.
    pub(crate) fn held(&self, name: &str) -> Option<u64> {
        self.prompt.as_ref()?;
        let held = self.known.held.iter().find(|(holder, _)| holder == name);
        Some(held.map_or(0, |(_, tokens)| *tokens))
    }

    /// Notes that these instances have answered the request, so they have its prompt in their caches.
    pub(crate) fn answered(&self, app: &App, pair: &Pair, body: &RequestBody, endpoint: Endpoint) {
        let Some(prompt) = &self.prompt else {
            return;
        };
        if !self.is_tokenised
            && let Some(question) = Question::of(body, endpoint, prompt, &pair.decode)
        {
            // If the queue is full, the next request with this prompt asks again.
            drop(app.questions.try_send(question));
        }
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

/// Replaces guesses by what the engines' KV events say. Returns true if the prompt's tokens are known.
fn refine(
    app: &App,
    known: &mut PrefixMatch,
    prompt: &Prompt,
    body: &RequestBody,
    named: Option<&str>,
) -> bool {
    let ids: Option<Vec<u32>> =
        first_token::token_ids(body).and_then(|ids| serde_json::from_str(ids).ok());
    let instances = app.instances();
    let is_adapter = |name: &&str| instances.iter().any(|i| i.models.is_adapter(name));
    let salt = body.json("cache_salt").and_then(model::name);
    let asked = Asked {
        ids: ids.as_deref(),
        adapter: named.filter(is_adapter),
        salt: salt.as_deref(),
    };
    app.kv_index.refine(known, prompt, asked)
}

/// Bytes per token of English text. The load of instances is computed with this number if no better
/// estimate is known.
const BYTES_PER_TOKEN: u64 = 4;
