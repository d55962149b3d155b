//! The requests under way, by id: where words from the registration port meet their request.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use protocol::RequestId;
use protocol::registration::NotifX;
use tokio::sync::Notify;

use crate::telemetry::record::Moved;

/// Every request under way that has a prefill leg.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    requests: Mutex<HashMap<RequestId, Arc<Progress>>>,
}

/// What others say about one request under way.
#[derive(Debug)]
pub(crate) struct Progress {
    /// The prefill instance: only its word on the request's progress counts.
    prefill: String,
    begun: Notify,
    begun_at: OnceLock<Instant>,
    prefill_end: OnceLock<PrefillNote>,
    moved: Mutex<Option<Moved>>,
    /// Another rank's notice has come.
    noticed: Notify,
}

/// How and when a prefill leg ended.
#[derive(Clone, Debug)]
pub(crate) struct PrefillNote {
    /// When.
    pub at: Instant,
    /// What went wrong, if anything.
    pub error: Option<String>,
    /// The prompt's length as its engine counts it.
    pub prompt_tokens: Option<u64>,
    /// Those that it had cached, if it says it.
    pub cached_tokens: Option<u64>,
}

/// A request's place in [`InFlight`]; leaves it when dropped.
#[derive(Debug)]
pub(crate) struct InFlightGuard {
    all: Arc<InFlight>,
    id: RequestId,
    /// What others say about the request.
    pub progress: Arc<Progress>,
}

impl InFlight {
    /// Enters a request whose prefill leg goes to `prefill`. Ids are unique by construction.
    pub(crate) fn enter(self: &Arc<Self>, id: &RequestId, prefill: &str) -> InFlightGuard {
        let progress = Arc::new(Progress {
            prefill: prefill.to_owned(),
            begun: Notify::new(),
            begun_at: OnceLock::new(),
            prefill_end: OnceLock::new(),
            moved: Mutex::new(None),
            noticed: Notify::new(),
        });
        self.lock().insert(id.clone(), Arc::clone(&progress));
        InFlightGuard {
            all: Arc::clone(self),
            id: id.clone(),
            progress,
        }
    }

    /// The prefill engine has begun. Returns whether the request is known and `from` is its
    /// prefill instance.
    pub(crate) fn begun(&self, now: Instant, id: &RequestId, from: &str) -> bool {
        let progress = self.lock().get(id).cloned();
        let Some(progress) = progress.filter(|progress| progress.prefill == from) else {
            return false;
        };
        // Every rank says so; the first counts.
        if progress.begun_at.set(now).is_ok() {
            progress.begun.notify_one();
        }
        true
    }

    /// A sender's word on the KV. Returns whether the request is known.
    pub(crate) fn moved(&self, id: &RequestId, notice: Option<&NotifX>) -> bool {
        let Some(progress) = self.lock().get(id).cloned() else {
            return false;
        };
        let mut moved = progress
            .moved
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        moved.get_or_insert_default().add(notice);
        progress.noticed.notify_one();
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<RequestId, Arc<Progress>>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Progress {
    /// Waits until the prefill engine has begun. For one waiter.
    ///
    /// # Cancel safety
    /// The word is not lost: a later call returns at once, if none has returned yet.
    pub(crate) async fn begun(&self) {
        self.begun.notified().await;
    }

    /// Waits until so many ranks have said that their KV is written. For one waiter.
    pub(crate) async fn noticed(&self, ranks: usize) {
        let enough = |moved: Moved| usize::try_from(moved.ranks).is_ok_and(|said| said >= ranks);
        while !self.moved().is_some_and(enough) {
            self.noticed.notified().await;
        }
    }

    /// When the prefill engine began.
    pub(crate) fn begun_at(&self) -> Option<Instant> {
        self.begun_at.get().copied()
    }

    /// Notes the end of the prefill leg.
    pub(crate) fn prefill_ended(&self, note: PrefillNote) {
        // A leg ends once; were it to end twice, the first would be the true one.
        drop(self.prefill_end.set(note));
    }

    /// The end of the prefill leg.
    pub(crate) fn prefill_end(&self) -> Option<&PrefillNote> {
        self.prefill_end.get()
    }

    /// What the sender said about the KV.
    pub(crate) fn moved(&self) -> Option<Moved> {
        let moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner);
        moved.clone()
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        if let Entry::Occupied(entry) = self.all.lock().entry(self.id.clone())
            && Arc::ptr_eq(entry.get(), &self.progress)
        {
            entry.remove();
        }
    }
}
