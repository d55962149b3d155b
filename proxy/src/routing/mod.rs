//! The choice of a request's instances: a pure function of the instances, their load and the request.

pub(crate) mod kv_index;
pub(crate) mod mode;
pub(crate) mod models;
pub(crate) mod policy;
pub(crate) mod prefix_index;
pub(crate) mod refusals;
mod scope;

use std::fmt;
use std::sync::Arc;

use crate::fleet::instance::Instance;
use crate::fleet::load::LoadSnapshot;
use crate::openai::error::{ApiError, Code};
use crate::openai::fallback::Fallback;
use crate::routing::mode::{Costs, Mode};
use crate::routing::policy::{Candidate, Policy, Request};
use crate::routing::refusals::Between;
use crate::routing::scope::Scope;

/// The properties of a request that routing reads.
#[derive(Clone, Debug)]
pub(crate) struct RouteRequest<'a> {
    /// Name of the model or adapter; `None` if the request names none.
    pub model: Option<&'a str>,
    /// The reason for which the request is not split over two instances; `None` if it may be split.
    pub fallback: Option<Fallback>,
    /// True if the hand-over of the first token would change the answer.
    pub is_unsplittable: bool,
    /// True if the request has a cache salt, which LMCache's keys do not contain.
    pub is_salted: bool,
    /// The reason for which the request is not split over instances without sidecars; `None` if it may be
    /// split over any pair.
    pub sidecars_only: Option<Fallback>,
    /// True if the endpoint is neither completions nor chat. Not all connectors can hand KV over for it.
    pub is_other_endpoint: bool,
    /// Policy and turn for the choice of a prefill instance.
    pub prefill: SideChoice,
    /// Policy and turn for the choice of a decode instance.
    pub decode: SideChoice,
    /// The mode, which decides which requests get a prefill leg.
    pub mode: Mode,
    /// The costs that mode `auto` compares.
    pub costs: Costs,
    /// Hash of the request's session; `None` if the request names none.
    pub session: Option<u64>,
    /// Estimated length of the prompt in tokens.
    pub prompt_tokens: u64,
    /// Ids of instances, each with the number of the prompt's tokens that the instance holds. An absent
    /// instance holds none.
    pub held: &'a [(String, u64)],
    /// Id of the decode instance that answered the previous turn of the conversation; `None` for a first
    /// turn.
    pub conversation: Option<&'a str>,
    /// Ids of the instances that have already failed this request.
    pub failed: &'a [String],
    /// Instances that are known to refuse requests of this kind.
    pub refused: &'a [Between],
}

/// The choice of one side: prefill or decode.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SideChoice {
    /// The policy by which the instance is chosen.
    pub policy: Policy,
    /// Number of requests so far. This number decides which of several equal instances is next.
    pub turn: usize,
}

/// The instances of a request.
#[derive(Clone, Debug)]
pub(crate) struct Pair {
    /// The instance that decodes the request.
    pub decode: Arc<Instance>,
    /// The instance that computes the prompt, or the reason for which the decode instance computes it.
    pub prefill: Result<Arc<Instance>, Fallback>,
    /// The details of the choice, for the log line.
    pub choice: Decision,
}

/// The details of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Decision {
    /// Number of prefill instances that could be chosen.
    pub prefills: usize,
    /// Number of decode instances that could be chosen.
    pub decodes: usize,
    /// The policy that chose the prefill instance.
    pub prefill: Policy,
    /// The policy that chose the decode instance, unless `follows` is true.
    pub decode: Policy,
    /// The mode, which decides which requests get a prefill leg.
    pub mode: Mode,
    /// True if the decode instance was chosen because it has the conversation.
    pub follows: bool,
}

/// No instance can take the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRoute {
    /// No instance with a decode role has registered.
    #[error("no decode instance is registered")]
    NoDecode,
    /// Decode instances have registered, but none is ready.
    #[error("none of the {0} registered decode instances is ready")]
    NoneReady(usize),
    /// Every ready decode instance has failed this request.
    #[error("every ready decode instance has failed this request")]
    AllFailed,
}

/// Chooses the instances of a request. `loads` has the loads of `instances`, in the same order.
///
/// # Errors
/// No decode instance can take the request.
pub(crate) fn route(
    instances: &[Arc<Instance>],
    loads: &[LoadSnapshot],
    ask: &RouteRequest<'_>,
) -> Result<Pair, NoRoute> {
    let scope = Scope::of(instances, ask.model);
    let decodes = decodes(instances, loads, ask, scope)?;
    let request = |side: SideChoice| Request {
        turn: side.turn,
        session: ask.session,
        prompt_tokens: ask.prompt_tokens,
    };
    // In `ppd` and `auto`, the instance with the conversation is preferred: it has the KV of the earlier
    // turns.
    let holder = decodes
        .iter()
        .find(|c| ask.mode != Mode::Pd && ask.conversation == Some(c.instance.id.as_str()));
    let follows = holder.is_some();
    let chosen = holder
        .copied()
        .or_else(|| ask.decode.policy.choose(&decodes, request(ask.decode)));
    let decode = chosen.ok_or(NoRoute::AllFailed)?;
    // The decode instance is chosen first, because only some prefill instances can hand KV over to it.
    let prefills = prefills(instances, loads, ask, scope, decode.instance);
    let prefill = match (
        ask.fallback,
        ask.prefill.policy.choose(&prefills, request(ask.prefill)),
    ) {
        // If a property of the request is the reason, metrics must name this reason, and not a reason of the
        // instances.
        (Some(fallback), _) => Err(fallback),
        (None, _) if follows && ask.mode == Mode::Ppd => Err(Fallback::LaterTurn),
        (None, _) if ask.is_unsplittable && decode.instance.connector.spec().needs_first_token => {
            Err(Fallback::NotExpressible)
        }
        (None, None) => Err(no_prefill(instances, ask, scope, decode.instance)),
        (None, Some(prefill)) => {
            // Only the mode `auto` compares costs: `pd` and `ppd` must not depend on measured costs.
            let weighed = ask.mode == Mode::Auto;
            if weighed
                && ask
                    .costs
                    .local_is_cheaper(ask.prompt_tokens, &decode, &prefill)
            {
                Err(Fallback::Cheaper)
            } else {
                Ok(Arc::clone(prefill.instance))
            }
        }
    };
    Ok(Pair {
        decode: Arc::clone(decode.instance),
        prefill,
        choice: Decision {
            prefills: prefills.len(),
            decodes: decodes.len(),
            prefill: ask.prefill.policy,
            decode: ask.decode.policy,
            mode: ask.mode,
            follows,
        },
    })
}

/// Returns the decode instances that can be chosen: they are ready and have not failed this request. Prefers
/// instances that do not keep failing; among these, prefers instances to which a prefill instance can hand KV
/// over.
fn decodes<'a>(
    instances: &'a [Arc<Instance>],
    loads: &[LoadSnapshot],
    ask: &RouteRequest<'_>,
    scope: Scope<'_>,
) -> Result<Vec<Candidate<'a>>, NoRoute> {
    let takes = |i: &Instance| i.decodes() && scope.decodes(i);
    let mut ready = candidates(instances, loads, ask, takes);
    if ready.is_empty() {
        let registered = instances.iter().filter(|i| takes(i)).count();
        return Err(match registered {
            0 => NoRoute::NoDecode,
            _ => NoRoute::NoneReady(registered),
        });
    }
    ready.retain(|c| !ask.failed.contains(&c.instance.id));
    if ready.is_empty() {
        return Err(NoRoute::AllFailed);
    }
    prefer(&mut ready, |c| !c.load.is_open);
    if ask.fallback.is_none() {
        prefer(&mut ready, |c| {
            let gives = |i: &Instance| {
                i.prefills() && i.is_ready() && hands_over(i, c.instance, ask, scope)
            };
            instances.iter().any(|i| gives(i))
        });
    }
    Ok(ready)
}

/// Returns the prefill instances that can hand KV over to `decode`.
fn prefills<'a>(
    instances: &'a [Arc<Instance>],
    loads: &[LoadSnapshot],
    ask: &RouteRequest<'_>,
    scope: Scope<'_>,
    decode: &Instance,
) -> Vec<Candidate<'a>> {
    let mut ready = candidates(instances, loads, ask, |i| {
        i.prefills() && hands_over(i, decode, ask, scope) && !ask.failed.contains(&i.id)
    });
    // If all prefill instances keep failing, the decode instance computes the prompt, because one more
    // prefill leg would probably fail, too.
    ready.retain(|c| !c.load.is_open);
    ready
}

fn candidates<'a>(
    instances: &'a [Arc<Instance>],
    loads: &[LoadSnapshot],
    ask: &RouteRequest<'_>,
    takes: impl Fn(&Instance) -> bool,
) -> Vec<Candidate<'a>> {
    let held = |id: &str| ask.held.iter().find(|(name, _)| name == id);
    instances
        .iter()
        .enumerate()
        .filter(|(_, instance)| instance.is_ready() && takes(instance))
        .map(|(at, instance)| Candidate {
            instance,
            load: loads.get(at).copied().unwrap_or_default(),
            held: held(&instance.id).map_or(0, |(_, tokens)| *tokens),
        })
        .collect()
}

/// Returns true if these are two different instances whose connectors can be a pair.
fn is_pair(prefill: &Instance, decode: &Instance) -> bool {
    let handoff = decode.connector.receives_from(prefill.connector);
    handoff.is_some() && prefill.id != decode.id
}

/// Returns true if these two instances are a pair, both serve the request's model, and no known reason prevents
/// the transfer of this request's KV.
fn hands_over(
    prefill: &Instance,
    decode: &Instance,
    ask: &RouteRequest<'_>,
    scope: Scope<'_>,
) -> bool {
    is_pair(prefill, decode)
        && scope.prefills(prefill)
        && prefill.kv.fits(&decode.kv)
        && keeps_salt(prefill, decode, ask)
        && has_sidecars(prefill, decode, ask)
        && takes_endpoint(prefill, decode, ask)
        && !is_refused(prefill, decode, ask)
}

/// Returns true if the request has no salt, or if both connectors find KV by the salt, too.
fn keeps_salt(prefill: &Instance, decode: &Instance, ask: &RouteRequest<'_>) -> bool {
    let ignores = |instance: &Instance| instance.connector.spec().ignores_salt;
    !ask.is_salted || !(ignores(prefill) || ignores(decode))
}

/// Returns true if both instances have sidecars, or if the request needs none.
fn has_sidecars(prefill: &Instance, decode: &Instance, ask: &RouteRequest<'_>) -> bool {
    let has = |instance: &Instance| instance.connector.spec().has_sidecar;
    ask.sidecars_only.is_none() || (has(prefill) && has(decode))
}

/// Returns true if both connectors hand KV over for the request's endpoint.
fn takes_endpoint(prefill: &Instance, decode: &Instance, ask: &RouteRequest<'_>) -> bool {
    let takes = |instance: &Instance| instance.connector.spec().splits_all_endpoints;
    !ask.is_other_endpoint || (takes(prefill) && takes(decode))
}

fn is_refused(prefill: &Instance, decode: &Instance, ask: &RouteRequest<'_>) -> bool {
    let holds = |between: &Between| between.holds_for(prefill, decode);
    ask.refused.iter().any(holds)
}

/// Returns the reason for which no prefill instance can hand KV over to `decode`.
fn no_prefill(
    instances: &[Arc<Instance>],
    ask: &RouteRequest<'_>,
    scope: Scope<'_>,
    decode: &Instance,
) -> Fallback {
    let is_there = |i: &Instance| i.prefills() && i.is_ready() && scope.prefills(i);
    let there =
        |i: &&Arc<Instance>| is_there(i) && is_pair(i, decode) && !ask.failed.contains(&i.id);
    let there: Vec<_> = instances.iter().filter(there).collect();
    let fits = |i: &&Arc<Instance>| i.kv.fits(&decode.kv);
    let fitting: Vec<_> = there.iter().copied().filter(fits).collect();
    if fitting.is_empty() && !there.is_empty() {
        return Fallback::Unfit;
    }
    if !fitting.is_empty() && !fitting.iter().any(|i| keeps_salt(i, decode, ask)) {
        return Fallback::CacheSalt;
    }
    if let Some(why) = ask.sidecars_only
        && !fitting.is_empty()
        && !fitting.iter().any(|i| has_sidecars(i, decode, ask))
    {
        return why;
    }
    if !fitting.is_empty() && !fitting.iter().any(|i| takes_endpoint(i, decode, ask)) {
        return Fallback::NotExpressible;
    }
    if !fitting.is_empty() && fitting.iter().all(|i| is_refused(i, decode, ask)) {
        return Fallback::RefusedBefore;
    }
    Fallback::NoPrefill
}

/// Keeps the elements that have a property, or all elements if none has it.
fn prefer<T>(all: &mut Vec<T>, has: impl Fn(&T) -> bool) {
    if all.iter().any(&has) {
        all.retain(has);
    }
}

impl From<NoRoute> for ApiError {
    fn from(error: NoRoute) -> Self {
        let code = match error {
            NoRoute::NoDecode => Code::NoDecode,
            NoRoute::NoneReady(_) => Code::NoneReady,
            NoRoute::AllFailed => Code::DecodeUnreachable,
        };
        Self::new(code, error.to_string())
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let decode = if self.follows {
            "conversation"
        } else {
            self.decode.as_str()
        };
        write!(
            f,
            "{}:{}/{},{}/{}",
            self.mode, self.prefill, self.prefills, decode, self.decodes
        )
    }
}

#[cfg(test)]
mod tests;
