//! Finds pairs of instances whose KV layouts are not compatible, and logs each pair once, with the remedy.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Serialize;
use tracing::warn;

use crate::fleet::instance::{Instance, Standing};
use crate::fleet::kv_fit::Kv;

/// Another instance with which an instance cannot be paired.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Unfit {
    /// The id of the other instance.
    pub with: String,
    /// The reason, and the remedy.
    pub why: String,
}

/// Returns the ready instances that cannot be paired with this instance for one reason only: the KV layouts
/// that the two sidecars report are not compatible.
pub(crate) fn unfit(instance: &Instance, all: &[Arc<Instance>]) -> Vec<Unfit> {
    let ready = all.iter().filter(|other| other.standing == Standing::Ready);
    ready
        .filter_map(|other| {
            let there = misfit(instance, other);
            let back = || misfit(other, instance);
            let why = there.or_else(back)?;
            let with = other.id.clone();
            Some(Unfit { with, why })
        })
        .collect()
}

/// The pairs that the log contains already. A pair is logged again only after one of its instances is no
/// longer registered.
#[derive(Debug, Default)]
pub(super) struct LoggedPairs {
    seen: Vec<(String, u64, Kv)>,
    logged: BTreeSet<(String, String, String)>,
}

impl LoggedPairs {
    /// Logs the pairs that are new.
    pub(super) fn log(&mut self, all: &[Arc<Instance>]) {
        let is_there = |id: &str| id.is_empty() || all.iter().any(|i| i.id == id);
        self.logged
            .retain(|(one, other, _)| is_there(one) && is_there(other));
        let ready = all.iter().filter(|i| i.standing == Standing::Ready);
        let now = ready.clone().map(|i| (&i.id, i.epoch, &i.kv));
        // If no ready instance has changed, return at once: most heartbeats change nothing.
        if now.eq(self.seen.iter().map(|(id, epoch, kv)| (id, *epoch, kv))) {
            return;
        }
        self.seen = ready
            .clone()
            .map(|i| (i.id.clone(), i.epoch, i.kv.clone()))
            .collect();
        for one in ready.clone() {
            if !one.kv.unmoved.is_empty() {
                let why = one.kv.unmoved.escape_debug().to_string();
                if self.logged.insert((one.id.clone(), String::new(), why)) {
                    let why = &one.kv.unmoved;
                    warn!(
                        id = one.id,
                        why, "moves no KV: the decode instance computes each prompt itself"
                    );
                }
                continue;
            }
            for other in ready.clone().filter(|i| i.kv.unmoved.is_empty()) {
                let Some(why) = misfit(one, other) else {
                    continue;
                };
                let entry = (one.id.clone(), other.id.clone(), why);
                if !self.logged.contains(&entry) {
                    let (prefill, decode, why) = &entry;
                    warn!(
                        prefill,
                        decode,
                        "not a pair, so the decode instance computes each prompt itself: {why}"
                    );
                }
                self.logged.insert(entry);
            }
        }
    }
}

/// Returns the reason why KV cannot move from `prefill` to `decode`, although their connectors have a common
/// way to hand KV over. Returns `None` if KV can move, or if the instances cannot be a pair for other
/// reasons.
fn misfit(prefill: &Instance, decode: &Instance) -> Option<String> {
    if !prefill.prefills() || !decode.decodes() || prefill.id == decode.id {
        return None;
    }
    decode.connector.receives_from(prefill.connector)?;
    prefill.kv.misfit(&decode.kv)
}

#[cfg(test)]
mod tests;
