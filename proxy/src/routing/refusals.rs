//! Refusals that will repeat: what a prefill instance computes, but does not hand over.
//!
//! A prefill leg whose KV is not pushed computes the prompt for nothing. The answer of the engine's
//! connector, and the sender's word, say why. Some of these reasons hold for the next request too:
//! for all of a pair (`key_mismatch`), for a model name (`lora`), or for requests of the same kind
//! (`prompt_logprobs`). They are kept for a while, and no such prefill leg is sent meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::{info, warn};

use crate::fleet::instance::Instance;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;

/// What is known to be refused.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    entries: Mutex<HashMap<About, BTreeMap<Between, Entry>>>,
    /// Their number: without any, requests do not wait for the lock.
    count: AtomicUsize,
}

/// The requests that a refusal holds for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum About {
    /// All.
    Any,
    /// Those that name this model.
    Model(String),
    /// Those that are made of the same fields.
    Kind(String),
}

/// The instances that a refusal holds for. Another epoch is another instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Between {
    prefill: (String, u64),
    /// Absent: whatever the decode instance.
    decode: Option<(String, u64)>,
}

#[derive(Debug)]
struct Entry {
    reason: String,
    /// Requests in a row that ended so.
    strikes: u32,
    /// The last of them.
    request: String,
    until: Instant,
    /// It stands in the log.
    is_said: bool,
}

/// A refusal for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Shown {
    /// The decode instance, if it holds for one only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decode: Option<String>,
    /// The requests that it holds for.
    pub requests: String,
    /// The reason that the connector or the sender gave.
    pub reason: String,
    /// Seconds after which such a request is tried again.
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
    /// Where it came.
    pub endpoint: Endpoint,
}

/// How far a reason reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    Instance,
    Pair,
    Model,
    Kind,
}

impl Between {
    /// These two are meant.
    pub(crate) fn holds_for(&self, prefill: &Instance, decode: &Instance) -> bool {
        is(&self.prefill, prefill) && self.decode.as_ref().is_none_or(|one| is(one, decode))
    }
}

impl Refusals {
    /// The instances that are known to refuse a request like this.
    pub(crate) fn of(&self, now: Instant, body: &RequestBody, endpoint: Endpoint) -> Vec<Between> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let about = [
            About::Any,
            About::Model(body.model().to_owned()),
            About::Kind(body.shape(endpoint)),
        ];
        let entries = self.lock();
        about
            .iter()
            .filter_map(|about| entries.get(about))
            .flatten()
            .filter(|(_, entry)| entry.holds(now))
            .map(|(between, _)| between.clone())
            .collect()
    }

    /// Takes the reason for which a request's KV was not handed over. Says it once, if it will repeat.
    pub(crate) fn note(&self, now: Instant, reason: &str, refused: Refused<'_>) {
        let Some(reach) = reach(reason) else {
            return;
        };
        let about = match reach {
            Reach::Instance | Reach::Pair => About::Any,
            Reach::Model => About::Model(refused.body.model().to_owned()),
            Reach::Kind => About::Kind(refused.body.shape(refused.endpoint)),
        };
        if about.text().len() > MAX_TEXT_BYTES {
            return;
        }
        let name = |instance: &Instance| (instance.id.clone(), instance.epoch);
        let between = Between {
            prefill: name(refused.prefill),
            decode: (reach == Reach::Pair).then(|| name(refused.decode)),
        };
        let mut entries = self.lock();
        make_room(&mut entries, now);
        let known = entries.entry(about.clone()).or_default();
        let entry = known
            .entry(between)
            .or_insert_with(|| Entry::new(reason, now));
        if entry.request != refused.request {
            refused.request.clone_into(&mut entry.request);
            entry.strikes += 1;
        }
        let (strikes, time) = limits(reason);
        let is_learned = entry.strikes >= strikes && !entry.holds(now);
        if entry.strikes >= strikes {
            entry.until = now + time;
        }
        let is_first = is_learned && !entry.is_said;
        entry.is_said |= is_learned;
        self.count
            .store(entries.values().map(BTreeMap::len).sum(), Ordering::Release);
        drop(entries);
        if is_first {
            warn!(
                prefill = refused.prefill.id,
                decode = refused.decode.id,
                reason,
                requests = about.text(),
                "KV is not handed over: such requests are computed by the decode instance alone, and \
                 tried again after {} s. {}",
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

    /// KV went from one to the other: what failed between them before does not count.
    pub(crate) fn worked(&self, prefill: &Instance, decode: &Instance) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut entries = self.lock();
        if let Some(of_pairs) = entries.get_mut(&About::Any) {
            of_pairs.retain(|between, _| !between.holds_for(prefill, decode));
        }
        self.count
            .store(entries.values().map(BTreeMap::len).sum(), Ordering::Release);
    }

    /// The instance may be another one from now on.
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

    /// What a prefill instance is known to refuse.
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
            is_said: false,
        }
    }

    fn holds(&self, now: Instant) -> bool {
        now < self.until
    }
}

fn is(name: &(String, u64), instance: &Instance) -> bool {
    name.0 == instance.id && name.1 == instance.epoch
}

/// Keeps the memory bounded: what is over goes first, then what would be over next.
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

/// How far a reason of a connector or of a sender reaches; `None` if it says nothing of other requests.
fn reach(reason: &str) -> Option<Reach> {
    Some(match reason {
        "layout" | "kv_groups" | "wrong_role" | "push_off" => Reach::Instance,
        "tp_mismatch" | "layout_mismatch" | "version_mismatch" | "key_mismatch" | "no_link" => {
            Reach::Pair
        }
        "lora" => Reach::Model,
        "multimodal" | "cache_salt" | "prompt_embeds" | "prompt_logprobs" | "pooling"
        | "streaming_input" => Reach::Kind,
        _ => return None,
    })
}

/// Requests in a row that have to end so, and the time for which it is then taken to repeat.
fn limits(reason: &str) -> (u32, Duration) {
    match reason {
        // A network that is down for a moment is no reason to give the pair up.
        "no_link" => (3, BRIEFLY),
        // One prompt can be rendered in two ways, as where a template has the time in it, and its client would
        // switch the pair off for everybody. Keys that never meet do so in every request.
        "key_mismatch" => (3, LONG),
        _ => (1, LONG),
    }
}

fn cure(reason: &str) -> &'static str {
    match reason {
        "key_mismatch" => {
            "Set `model_name`, `chunk_size`, `hash_algorithm` and PYTHONHASHSEED alike on both sides"
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

/// More is nobody's fleet.
const MAX_ENTRIES: usize = 1024;
/// Longer names of models and kinds are not kept.
const MAX_TEXT_BYTES: usize = 512;
/// An engine may be started anew with other options behind the same sidecar.
const LONG: Duration = Duration::from_secs(300);
/// For what may pass by itself.
const BRIEFLY: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests;
