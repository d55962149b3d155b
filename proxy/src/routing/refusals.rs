//! Refusals that are expected to repeat: a prefill instance computes the prompt of a request, but does not
//! hand the KV over.
//!
//! A prefill leg whose KV is not pushed is useless, because the decode instance computes the prompt again.
//! The engine's connector or the sender gives the reason. Some reasons hold for later requests, too: for all
//! requests of a pair (`layout_mismatch`), for a model name (`lora`; `key_mismatch` between two instances),
//! or for requests of the same kind (`prompt_logprobs`). The proxy remembers these reasons for a while.
//! While the proxy remembers a reason, it sends no prefill leg that would be refused for this reason again.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::{info, warn};

use crate::fleet::instance::Instance;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;
use crate::openai::fallback::Fallback;

/// The known refusals.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    entries: Mutex<HashMap<About, BTreeMap<Between, Entry>>>,
    /// Number of refusals. While no refusal is known, requests do not take the lock.
    count: AtomicUsize,
}

/// The requests for which a refusal holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum About {
    /// All requests.
    Any,
    /// Requests that name this model.
    Model(String),
    /// Requests of the same shape, as [`RequestBody::shape`] gives it.
    Kind(String),
}

/// The instances for which a refusal holds, by id and epoch. The same id with another epoch is another
/// instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Between {
    prefill: (String, u64),
    /// `None` if the refusal holds for every decode instance.
    decode: Option<(String, u64)>,
}

#[derive(Debug)]
struct Entry {
    reason: String,
    /// Number of requests in a row that were refused for this reason.
    strikes: u32,
    /// Id of the last of these requests. The engine and the sender may both report this request, but the
    /// request counts only once.
    request: String,
    /// Time until which the refusal holds; in the past if the refusal does not hold.
    until: Instant,
    /// True if the log has a warning about this refusal.
    is_logged: bool,
}

/// A refusal as `/instances` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Shown {
    /// Id of the decode instance; `None` if the refusal holds for every decode instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<String>,
    /// The requests for which the refusal holds.
    pub requests: String,
    /// The reason that the connector or the sender gave.
    pub reason: String,
    /// Seconds until the proxy tries a request of this kind again.
    pub for_seconds: u64,
}

/// A prefill leg whose KV was not handed over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refused<'a> {
    /// The request's id.
    pub request: &'a str,
    /// The prefill instance.
    pub prefill: &'a Instance,
    /// The decode instance.
    pub decode: &'a Instance,
    /// The request's body.
    pub body: &'a RequestBody,
    /// The endpoint that the request uses.
    pub endpoint: Endpoint,
}

/// The requests and instances for which a reason holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// All requests that the prefill instance computes for any decode instance.
    Instance,
    /// All requests between these two instances.
    Pair,
    /// Requests that name this model, at this prefill instance.
    Model,
    /// Requests that name this model, between these two instances. The keys depend on an adapter's weights:
    /// if the two sides have different keys for one model, their keys for other models may be equal.
    PairAndModel,
    /// Requests of this shape, at this prefill instance.
    Kind,
    /// Requests of this shape, between these two instances. If the two sides have different keys for images,
    /// their keys for text may be equal.
    PairAndKind,
}

impl Between {
    /// Returns true if the refusal holds for these two instances.
    pub(crate) fn holds_for(&self, prefill: &Instance, decode: &Instance) -> bool {
        is(&self.prefill, prefill) && self.decode.as_ref().is_none_or(|one| is(one, decode))
    }
}

impl Refusals {
    /// Returns the instances that are known to refuse requests like this request.
    pub(crate) fn of(&self, now: Instant, body: &RequestBody, endpoint: Endpoint) -> Vec<Between> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let about = abouts(body, endpoint);
        let entries = self.lock();
        about
            .iter()
            .filter_map(|about| entries.get(about))
            .flatten()
            .filter(|(_, entry)| entry.holds(now))
            .map(|(between, _)| between.clone())
            .collect()
    }

    /// Records the reason for which a request's KV was not handed over. Logs a warning the first time
    /// that the reason is expected to repeat.
    pub(crate) fn note(&self, now: Instant, reason: &str, refused: Refused<'_>) {
        let has_media = refused.body.sidecars_only(refused.endpoint) == Some(Fallback::Multimodal);
        let reach = match reach(reason) {
            Some(Reach::PairAndModel) if has_media => Reach::PairAndKind,
            Some(reach) => reach,
            None => return,
        };
        let about = match reach {
            Reach::Instance | Reach::Pair => About::Any,
            Reach::Model | Reach::PairAndModel => About::Model(refused.body.model().to_owned()),
            Reach::Kind | Reach::PairAndKind => About::Kind(refused.body.shape(refused.endpoint)),
        };
        // A client must not fill the memory with long names of models or content parts.
        if about.text().len() > MAX_TEXT_BYTES {
            return;
        }
        let name = |instance: &Instance| (instance.id.clone(), instance.epoch);
        let between = Between {
            prefill: name(refused.prefill),
            decode: matches!(
                reach,
                Reach::Pair | Reach::PairAndModel | Reach::PairAndKind
            )
            .then(|| name(refused.decode)),
        };
        let mut entries = self.lock();
        // Make room before the insertion, so that the number of entries never exceeds the limit.
        make_room(&mut entries, now);
        let known = entries.entry(about.clone()).or_default();
        let entry = known
            .entry(between)
            .or_insert_with(|| Entry::new(reason, now));
        // The engine and the sender may both report one request, but the request counts only once.
        if entry.request != refused.request {
            refused.request.clone_into(&mut entry.request);
            entry.strikes += 1;
        }
        let (strikes, time) = limits(reason);
        let is_learned = entry.strikes >= strikes && !entry.holds(now);
        if entry.strikes >= strikes {
            entry.until = now + time;
        }
        // Log one warning per refusal. A refusal that is learned again later is logged as information.
        let is_first = is_learned && !entry.is_logged;
        entry.is_logged |= is_learned;
        self.count
            .store(entries.values().map(BTreeMap::len).sum(), Ordering::Release);
        // Writing to the log must not delay requests that wait for the lock.
        drop(entries);
        if is_first {
            warn!(
                prefill = refused.prefill.id,
                decode = refused.decode.id,
                reason,
                requests = about.text(),
                "KV is not handed over: for {} s the decode instance computes such requests alone; after that \
                 the proxy tries a hand-over again. {}",
                time.as_secs(),
                cure(reason)
            );
        } else if is_learned {
            info!(
                prefill = refused.prefill.id,
                reason, "KV is still not handed over"
            );
        }
    }

    /// Records that KV of a request went from one instance to the other. Removes earlier refusals between
    /// these two instances that hold for this request, too.
    pub(crate) fn worked(
        &self,
        prefill: &Instance,
        decode: &Instance,
        body: &RequestBody,
        endpoint: Endpoint,
    ) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let all = abouts(body, endpoint);
        let mut entries = self.lock();
        for about in &all {
            if let Some(known) = entries.get_mut(about) {
                known.retain(|between, _| !between.holds_for(prefill, decode));
            }
        }
        self.count
            .store(entries.values().map(BTreeMap::len).sum(), Ordering::Release);
    }

    /// Removes all refusals of an instance, because another process may have its id from now on.
    pub(crate) fn forget(&self, id: &str) {
        let mut entries = self.lock();
        for known in entries.values_mut() {
            known.retain(|between, _| {
                between.prefill.0 != id && between.decode.as_ref().is_none_or(|one| one.0 != id)
            });
        }
        entries.retain(|_, known| !known.is_empty());
        self.count
            .store(entries.values().map(BTreeMap::len).sum(), Ordering::Release);
    }

    /// Returns the known refusals of a prefill instance.
    pub(crate) fn by(&self, now: Instant, prefill: &Instance) -> Vec<Shown> {
        let entries = self.lock();
        let mut shown: Vec<_> = entries
            .iter()
            .flat_map(|(about, known)| known.iter().map(move |(b, entry)| (about, b, entry)))
            .filter(|(_, between, entry)| is(&between.prefill, prefill) && entry.holds(now))
            .map(|(about, between, entry)| Shown {
                decode: between.decode.as_ref().map(|(id, _)| id.clone()),
                requests: about.text(),
                reason: entry.reason.clone(),
                for_seconds: entry.until.saturating_duration_since(now).as_secs(),
            })
            .collect();
        shown.sort_by(|a, b| (&a.requests, &a.decode).cmp(&(&b.requests, &b.decode)));
        shown
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<About, BTreeMap<Between, Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl About {
    fn text(&self) -> String {
        match self {
            Self::Any => "all".to_owned(),
            Self::Model(model) => format!("model {model}"),
            Self::Kind(kind) => kind.clone(),
        }
    }
}

impl Entry {
    fn new(reason: &str, now: Instant) -> Self {
        Self {
            reason: reason.to_owned(),
            strikes: 0,
            request: String::new(),
            until: now,
            is_logged: false,
        }
    }

    fn holds(&self, now: Instant) -> bool {
        now < self.until
    }
}

/// Returns the groups to which a request belongs.
fn abouts(body: &RequestBody, endpoint: Endpoint) -> [About; 3] {
    [
        About::Any,
        About::Model(body.model().to_owned()),
        About::Kind(body.shape(endpoint)),
    ]
}

fn is(name: &(String, u64), instance: &Instance) -> bool {
    name.0 == instance.id && name.1 == instance.epoch
}

/// Removes refusals until there is room for one more: first expired refusals, then the refusals that would
/// expire next. This bounds the memory.
fn make_room(entries: &mut HashMap<About, BTreeMap<Between, Entry>>, now: Instant) {
    if entries.values().map(BTreeMap::len).sum::<usize>() < MAX_ENTRIES {
        return;
    }
    for known in entries.values_mut() {
        known.retain(|_, entry| entry.holds(now));
    }
    entries.retain(|_, known| !known.is_empty());
    while entries.values().map(BTreeMap::len).sum::<usize>() >= MAX_ENTRIES {
        let first = entries
            .iter()
            .min_by_key(|(_, known)| known.values().map(|entry| entry.until).min())
            .map(|(about, _)| about.clone());
        let Some(first) = first else { return };
        entries.remove(&first);
    }
}

/// Returns the reach of a reason that a connector or a sender gave; `None` if the reason does not
/// concern other requests.
fn reach(reason: &str) -> Option<Reach> {
    Some(match reason {
        "layout" | "kv_groups" | "wrong_role" | "push_off" => Reach::Instance,
        "tp_mismatch" | "layout_mismatch" | "version_mismatch" | "no_link" => Reach::Pair,
        "key_mismatch" => Reach::PairAndModel,
        "lora" => Reach::Model,
        "multimodal" | "cache_salt" | "prompt_embeds" | "prompt_logprobs" | "pooling"
        | "streaming_input" => Reach::Kind,
        _ => return None,
    })
}

/// Returns two limits for a reason: the number of refused requests in a row after which the reason is
/// expected to repeat, and the time for which the proxy then remembers the reason.
fn limits(reason: &str) -> (u32, Duration) {
    match reason {
        // A network that fails for a moment must not stop the transfers of the pair.
        "no_link" => (3, BRIEFLY),
        // One prompt can be rendered in two ways, for example if its template contains the time. A single
        // client whose prompt is rendered in two ways must not stop the pair's transfers for all clients.
        // Keys that never match fail in every request.
        "key_mismatch" => (3, LONG),
        _ => (1, LONG),
    }
}

fn cure(reason: &str) -> &'static str {
    match reason {
        "key_mismatch" => {
            "Set `model_name`, `chunk_size`, `hash_algorithm` and PYTHONHASHSEED alike on both sides; if the \
             model is a LoRA adapter, load the same files on both sides; if the requests have images, give \
             both engines the same --model and processor options"
        }
        "tp_mismatch" => {
            "Set `ranks` of both connectors, and the number of ports, to the larger tensor-parallel size"
        }
        "no_link" => {
            "Check that the sender reaches the receiver's ports, and that they have a wire in common"
        }
        "layout_mismatch" | "version_mismatch" => {
            "Run the same model, options and release on both sides"
        }
        "wrong_role" => "Give the prefill engine kv_role kv_producer or kv_both",
        "push_off" => "Start the sender without the flag that switches pushes off",
        _ => "KV of such requests is not moved (see the connector's README)",
    }
}

/// Maximum number of refusals that the proxy remembers. The limit is far above the need of any
/// fleet.
const MAX_ENTRIES: usize = 1024;
/// Maximum length of the model name or the shape in a refusal, in bytes. A refusal with a longer
/// text is not remembered.
const MAX_TEXT_BYTES: usize = 512;
/// Time for which most reasons are remembered. The time is limited, because an engine may be restarted with
/// other options while its sidecar stays the same.
const LONG: Duration = Duration::from_secs(300);
/// Time for which the proxy remembers a reason that may disappear by itself.
const BRIEFLY: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
