//! The drain of a process, in two steps: first the senders take no new KV, then every role ends.
//!
//! `sidecar drain` starts only the first step. A signal starts both steps.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The state of the drain. All copies share this state.
#[derive(Clone, Debug)]
pub(crate) struct Drain {
    senders: CancellationToken,
    roles: CancellationToken,
    ranks: Arc<watch::Sender<BTreeMap<u32, Kept>>>,
}

/// The KV of one rank that decode sides may still fetch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Kept {
    /// True if the rank takes no new KV any more.
    drains: bool,
    /// Number of requests with KV that is kept, or that a decode side is fetching.
    requests: u32,
}

impl Drain {
    /// Makes the state of a process that does not drain.
    pub(crate) fn new() -> Self {
        Self {
            senders: CancellationToken::new(),
            roles: CancellationToken::new(),
            ranks: Arc::new(watch::Sender::new(BTreeMap::new())),
        }
    }

    /// Starts the first step: the senders take no new KV. Decode sides may fetch the KV that is kept.
    pub(crate) fn begin(&self) {
        self.senders.cancel();
    }

    /// Starts both steps: every role ends when it has no request in flight and keeps no KV.
    pub(crate) fn end(&self) {
        self.senders.cancel();
        self.roles.cancel();
    }

    /// Completes when the first step starts.
    pub(crate) async fn begins(&self) {
        self.senders.cancelled().await;
    }

    /// Completes when the second step starts.
    pub(crate) async fn ends(&self) {
        self.roles.cancelled().await;
    }

    /// Returns true if the second step has started.
    pub(crate) fn is_ending(&self) -> bool {
        self.roles.is_cancelled()
    }

    /// Notes the state of a sender's rank.
    pub(crate) fn publish(&self, rank: u32, drains: bool, requests: u32) {
        let kept = Kept { drains, requests };
        self.ranks
            .send_if_modified(|ranks| ranks.insert(rank, kept) != Some(kept));
    }

    /// Returns the number of requests with KV that is kept, or that a decode side is fetching.
    pub(crate) fn unfetched(&self) -> u32 {
        self.ranks.borrow().values().map(|rank| rank.requests).sum()
    }

    /// Completes when the first step has started in every sender and no sender keeps KV.
    pub(crate) async fn fetched(&self) {
        let over =
            |ranks: &BTreeMap<u32, Kept>| ranks.values().all(|r| r.drains && r.requests == 0);
        // `self` holds the sending half, so the wait cannot fail.
        self.ranks.subscribe().wait_for(over).await.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn is_over(drain: &Drain) -> bool {
        tokio::select! {
            biased;
            () = drain.fetched() => true,
            () = std::future::ready(()) => false,
        }
    }

    #[tokio::test]
    async fn kv_is_fetched_only_when_no_sender_takes_or_keeps_any() {
        let drain = Drain::new();
        assert!(is_over(&drain).await, "there is no sender");
        drain.publish(0, false, 0);
        drain.publish(1, false, 2);
        drain.begin();
        assert!(!is_over(&drain).await, "both ranks may still take KV");
        drain.publish(0, true, 0);
        drain.publish(1, true, 1);
        assert!(!is_over(&drain).await && drain.unfetched() == 1);
        drain.publish(1, true, 0);
        assert!(is_over(&drain).await && !drain.is_ending());
    }
}
