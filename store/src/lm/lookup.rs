//! Look-ups: first in memory and on disk, then in the remote store.

use std::time::Duration;

use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, timeout_at};

use crate::cache::{Found, Missing, Tier};
use crate::entry::Key;
use crate::metrics::{Operation, Outcome};

use super::connection::Shared;
use super::shares::Share;

/// A look-up that has found a value. The value may be held outside of the limits of memory and of values in flight only
/// as long as this lives.
pub(super) type Turn<'a> = [SemaphorePermit<'a>; 2];

impl Shared {
    /// Finds a value. `until` is the end of the wait for a remote store.
    pub(super) async fn find<'a>(
        &'a self,
        share: &'a Share,
        operation: Operation,
        key: &Key,
        until: Instant,
    ) -> Option<(Found, Turn<'a>)> {
        let found = match self.near(share, key).await? {
            Err(missing) => match self.far(share, key, until).await {
                Some(Err(Missing::Absent)) | None => Err(missing),
                Some(found) => found,
            },
            found => found,
        };
        let outcome = match &found {
            Ok((found, _)) => match found.tier {
                Tier::Memory => Outcome::Hit,
                Tier::Disk => Outcome::HitOnDisk,
                Tier::Remote => Outcome::HitOnRemote,
            },
            Err(Missing::Absent) => Outcome::Miss,
            Err(Missing::Ended) => Outcome::Ended,
            Err(Missing::Broken) => Outcome::Broken,
        };
        self.metrics.count(operation, outcome);
        found.ok()
    }

    /// Returns the time until which a look-up that begins now may wait for a remote store.
    pub(super) fn until(&self) -> Instant {
        let remote = self.cache.remote();
        Instant::now() + remote.map_or(Duration::ZERO, |remote| remote.timeout())
    }

    /// Looks into memory and onto the disk. `None` if the store ends.
    async fn near<'a>(
        &'a self,
        share: &'a Share,
        key: &Key,
    ) -> Option<Result<(Found, Turn<'a>), Missing>> {
        // The semaphores are never closed. The host's own comes first, so that a host beyond its share does not wait in
        // front of other hosts.
        let turn = [
            share.lookups.acquire().await.ok()?,
            self.lookups.acquire().await.ok()?,
        ];
        Some(self.cache.get(key).await.map(|found| (found, turn)))
    }

    /// Looks into the remote store. `None` if there is none, or if it has no answer in time.
    ///
    /// The turns are others than those of memory and disk. Otherwise look-ups that wait for a slow remote store would keep
    /// others waiting whose values are near.
    async fn far<'a>(
        &'a self,
        share: &'a Share,
        key: &Key,
        until: Instant,
    ) -> Option<Result<(Found, Turn<'a>), Missing>> {
        if !self.cache.remote()?.may_answer() {
            return None;
        }
        let fetched = timeout_at(until, async {
            let turn = [
                share.remote_lookups.acquire().await.ok()?,
                self.remote_lookups.acquire().await.ok()?,
            ];
            Some(self.cache.fetch(key).await.map(|found| (found, turn)))
        });
        fetched.await.ok()?
    }
}
