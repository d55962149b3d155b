//! The requests in flight, by id. Messages from the registration port find their request in this list.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

use protocol::RequestId;
use protocol::registration::NotifX;
use tokio::sync::Notify;

use crate::telemetry::record::Moved;

/// The requests in flight that have a prefill leg.
#[derive(Debug, Default)]
pub(crate) struct InFlight {
    requests: Mutex<HashMap<RequestId, Arc<Progress>>>,
}

/// The progress of one request in flight, as sidecars and the prefill leg report it.
#[derive(Debug)]
pub(crate) struct Progress {
    /// The id of the prefill instance. Only this instance may report that the request has begun; the same
    /// report from any other instance is ignored.
    prefill: String,
    begun: Notify,
    begun_at: OnceLock<Instant>,
    prefill_end: OnceLock<PrefillNote>,
    moved: Mutex<Option<Moved>>,
    /// Each notice of a rank wakes the task that waits for notices.
    noticed: Notify,
}

/// The end of a prefill leg: its time, and its error, if any.
#[derive(Clone, Debug)]
pub(crate) struct PrefillNote {
    /// The time of the end.
    pub at: Instant,
    /// The reason why the leg failed; `None` if the leg was answered.
    pub error: Option<String>,
    /// The prompt's length in tokens, as the prefill engine counts it; `None` if the engine did not report
    /// it.
    pub prompt_tokens: Option<u64>,
    /// Number of the prompt's tokens that the prefill engine had cached; `None` if the engine did not report
    /// it.
    pub cached_tokens: Option<u64>,
    /// Number of the prompt's tokens that the prefill engine has put into its cache; `None` if the engine did
    /// not report it.
    pub written_tokens: Option<u64>,
}

/// A request's entry in [`InFlight`]. Dropping the guard removes the entry.
#[derive(Debug)]
pub(crate) struct InFlightGuard {
    all: Arc<InFlight>,
    id: RequestId,
    /// The progress of the request.
    pub progress: Arc<Progress>,
}

impl InFlight {
    /// Enters a request whose prefill leg goes to `prefill`. The proxy generates unique ids, so two requests
    /// never have the same entry.
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

    /// Notes that the prefill engine has begun. Returns true if the request is known and `from` is its
    /// prefill instance.
    pub(crate) fn begun(&self, now: Instant, id: &RequestId, from: &str) -> bool {
        let progress = self.lock().get(id).cloned();
        let Some(progress) = progress.filter(|progress| progress.prefill == from) else {
            return false;
        };
        // Every rank sends this message; the first message sets the time.
        if progress.begun_at.set(now).is_ok() {
            progress.begun.notify_one();
        }
        true
    }

    /// Adds a sender's notice about the request's KV. Returns true if the request is known.
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
    /// Waits until the prefill engine has begun. Only one task may wait at a time.
    ///
    /// # Cancel safety
    /// Cancelling loses nothing: if the engine has begun and no call has returned yet, the next call returns
    /// at once.
    pub(crate) async fn begun(&self) {
        self.begun.notified().await;
    }

    /// Waits until notices of at least `ranks` ranks have come. Only one task may wait at a time.
    pub(crate) async fn noticed(&self, ranks: usize) {
        let enough = |moved: Moved| usize::try_from(moved.ranks).is_ok_and(|said| said >= ranks);
        while !self.moved().is_some_and(enough) {
            self.noticed.notified().await;
        }
    }

    /// Returns the time at which the prefill engine began; `None` if it has not begun.
    pub(crate) fn begun_at(&self) -> Option<Instant> {
        self.begun_at.get().copied()
    }

    /// Notes the end of the prefill leg.
    pub(crate) fn prefill_ended(&self, note: PrefillNote) {
        // A leg ends only once, so a second end is ignored.
        drop(self.prefill_end.set(note));
    }

    /// Returns the end of the prefill leg; `None` while the leg is in flight.
    pub(crate) fn prefill_end(&self) -> Option<&PrefillNote> {
        self.prefill_end.get()
    }

    /// Returns the sum of the senders' notices about the KV; `None` before the first notice.
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
