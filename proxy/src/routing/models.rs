//! The state of each model that the proxy serves: its mode, its policies, its measured costs and its counts.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use crate::fleet::instance::Instance;
use crate::routing::SideChoice;
use crate::routing::mode::{CurrentMode, Measured, Mode};
use crate::routing::policy::Policy;

/// The mode and the policies of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    /// The mode at the start.
    pub mode: Mode,
    /// The policy that chooses the prefill instance.
    pub prefill: Policy,
    /// The policy that chooses the decode instance.
    pub decode: Policy,
}

/// The state of one model. Adapters share the state of their model.
#[derive(Debug)]
pub struct ModelState {
    /// Name of the model in metrics.
    pub(crate) name: Box<str>,
    /// The mode, which decides which requests get a prefill leg.
    pub(crate) mode: CurrentMode,
    /// Measured times of prefill and of the hand-over of KV.
    pub(crate) measured: Measured,
    /// Counts of the model's requests.
    pub(crate) counts: Counts,
    prefill_policy: Policy,
    decode_policy: Policy,
    prefill_turn: AtomicUsize,
    decode_turn: AtomicUsize,
}

/// Counts of the requests of one model.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Requests under way.
    pub in_flight: AtomicU64,
    /// Requests that have ended.
    pub ended: AtomicU64,
    /// Decode legs with a transfer.
    pub transfers: AtomicU64,
    /// Decode legs without a transfer.
    pub alone: AtomicU64,
    /// Answers that have begun.
    pub begun: AtomicU64,
    /// Sum of the times to the first bytes of these answers, in µs.
    pub first_byte_us: AtomicU64,
}

/// The states of all models.
#[derive(Debug)]
pub(crate) struct Models {
    usual: Rules,
    special: BTreeMap<String, Rules>,
    /// The state of requests for unknown models.
    unknown: Arc<ModelState>,
    states: Mutex<BTreeMap<Box<str>, Arc<ModelState>>>,
    table: RwLock<Arc<Table>>,
}

/// The state of each name that a request may give. The registration task replaces the table when names change.
#[derive(Debug, Default)]
struct Table {
    by_name: HashMap<Box<str>, Arc<ModelState>>,
    /// The state of requests that name no model; `None` if no decode instance has given its models.
    first: Option<Arc<ModelState>>,
}

/// Says whether a request may have a prefill leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfers {
    /// The request may have a prefill leg.
    Yes,
    /// The decode instance computes the request alone.
    No,
}

impl ModelState {
    fn new(name: &str, rules: Rules) -> Arc<Self> {
        let mode = CurrentMode::default();
        mode.set(rules.mode);
        Arc::new(Self {
            name: name.into(),
            mode,
            measured: Measured::default(),
            counts: Counts::default(),
            prefill_policy: rules.prefill,
            decode_policy: rules.decode,
            prefill_turn: AtomicUsize::new(0),
            decode_turn: AtomicUsize::new(0),
        })
    }

    /// Returns the policies for prefill and decode instances.
    pub(crate) fn policies(&self) -> [Policy; 2] {
        [self.prefill_policy, self.decode_policy]
    }

    /// Returns the policy of each side, and the turn number for its next choice. Only requests with a transfer
    /// advance the turn of the prefill side: otherwise each request without a transfer would make round-robin
    /// skip a prefill instance.
    pub(crate) fn next_turn(&self, transfers: Transfers) -> (SideChoice, SideChoice) {
        let prefill = match transfers {
            Transfers::Yes => self.prefill_turn.fetch_add(1, Ordering::Relaxed),
            Transfers::No => 0,
        };
        let decode = self.decode_turn.fetch_add(1, Ordering::Relaxed);
        let side = |policy, turn| SideChoice { policy, turn };
        (
            side(self.prefill_policy, prefill),
            side(self.decode_policy, decode),
        )
    }

    /// Returns true if routing depends on earlier requests, so that prompts have to be remembered.
    pub(crate) fn remembers(&self) -> bool {
        let reads = self.policies().into_iter().any(Policy::reads_prefixes);
        reads || self.mode.get() != Mode::Pd
    }
}

impl Counts {
    /// Counts a request that has arrived.
    pub(crate) fn arrived(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a request that has ended.
    pub(crate) fn ended(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a decode leg that is sent.
    pub(crate) fn decode_sent(&self, has_transfer: bool) {
        let count = match has_transfer {
            true => &self.transfers,
            false => &self.alone,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an answer that has begun after this time.
    pub(crate) fn first_byte_after(&self, time: Duration) {
        self.begun.fetch_add(1, Ordering::Relaxed);
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.first_byte_us.fetch_add(us, Ordering::Relaxed);
    }
}

impl Models {
    /// Returns the states before any instance has registered. `special` has the rules of single models, by name.
    pub(crate) fn new(usual: Rules, special: BTreeMap<String, Rules>) -> Self {
        Self {
            usual,
            special,
            unknown: ModelState::new(UNKNOWN, usual),
            states: Mutex::default(),
            table: RwLock::default(),
        }
    }

    /// Returns the state for a request that names this model; `None` if it names none.
    pub(crate) fn of(&self, model: Option<&str>) -> Arc<ModelState> {
        let table = self.table();
        let state = match model {
            Some(name) => table.by_name.get(name),
            None => table.first.as_ref(),
        };
        Arc::clone(state.unwrap_or(&self.unknown))
    }

    /// Returns the state of a model or adapter; `None` if no instance serves it.
    pub(crate) fn named(&self, name: &str) -> Option<Arc<ModelState>> {
        self.table().by_name.get(name).cloned()
    }

    /// Changes the mode of all models.
    pub(crate) fn set_mode(&self, mode: Mode) {
        for state in self.all() {
            state.mode.set(mode);
        }
    }

    /// Returns the states of the models that instances have named, sorted by name.
    pub(crate) fn served(&self) -> Vec<Arc<ModelState>> {
        let states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.values().cloned().collect()
    }

    /// Returns all states, the state of unknown models first.
    pub(crate) fn all(&self) -> Vec<Arc<ModelState>> {
        let states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let unknown = std::iter::once(&self.unknown);
        unknown.chain(states.values()).cloned().collect()
    }

    /// Adopts the names of these instances. The task that owns the instances calls this function before it publishes
    /// them.
    pub(crate) fn adopt(&self, instances: &[Arc<Instance>]) {
        let names = || instances.iter().flat_map(|i| i.models.names());
        let decodes = instances.iter().filter(|i| i.decodes());
        let first = decodes.filter_map(|i| i.models.base()).next();
        let before = self.table();
        let is_known = |name: &str| before.by_name.contains_key(name);
        // Most calls change no name. A name that vanishes stays in the table until another name appears.
        if names().all(is_known) && before.first.as_ref().map(|state| &*state.name) == first {
            return;
        }
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = Table::default();
        for instance in instances {
            let Some(base) = instance.models.base() else {
                continue;
            };
            let state = self.state(&mut states, base, instances);
            for name in instance.models.names() {
                let entry = table.by_name.entry(name.into());
                entry.or_insert_with(|| Arc::clone(&state));
            }
        }
        table.first = first.and_then(|name| table.by_name.get(name).cloned());
        drop(states);
        let mut current = self.table.write().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(table);
    }

    /// Returns the state of a model, and creates the state for a new model. If there are too many states, forgets the
    /// models that no instance serves. If all are served, the new model shares the state of unknown models.
    fn state(
        &self,
        states: &mut BTreeMap<Box<str>, Arc<ModelState>>,
        base: &str,
        instances: &[Arc<Instance>],
    ) -> Arc<ModelState> {
        if let Some(state) = states.get(base) {
            return Arc::clone(state);
        }
        if states.len() >= MAX_MODELS {
            states.retain(|name, _| instances.iter().any(|i| i.models.base() == Some(name)));
        }
        if states.len() >= MAX_MODELS {
            return Arc::clone(&self.unknown);
        }
        let state = ModelState::new(base, *self.special.get(base).unwrap_or(&self.usual));
        states.insert(base.into(), Arc::clone(&state));
        state
    }

    fn table(&self) -> Arc<Table> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&table)
    }
}

/// The label of requests for models that no instance serves.
const UNKNOWN: &str = "unknown";

/// Maximum number of models with an own state, and with own labels in metrics.
const MAX_MODELS: usize = 128;

#[cfg(test)]
mod tests;
