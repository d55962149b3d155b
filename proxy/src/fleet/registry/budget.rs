//! The limit on call-backs. Without the limit, a peer could register many foreign addresses, and the
//! proxy would flood their hosts with call-backs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::lease::Lease;

/// Call-backs in flight, and the rate at which the registrations of an id may cause further call-backs.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// Call-backs in flight to instances that have never answered.
    under_way: Vec<Call>,
    /// For each id, the time from which the id may again cause a whole burst of call-backs. An id
    /// without an entry may cause a burst now.
    names: BTreeMap<String, Instant>,
}

#[derive(Debug)]
struct Call {
    id: String,
    epoch: u64,
    /// Hosts to which the call-back connects.
    hosts: [Option<String>; 2],
}

impl Budget {
    /// Returns the earliest time at which a registration of this id may cause a call-back.
    pub(super) fn prompted(&mut self, now: Instant, id: &str) -> Instant {
        self.names.retain(|_, full_at| *full_at > now);
        let full_at = self.names.get(id).copied().unwrap_or(now).max(now);
        self.names.insert(
            id.to_owned(),
            (full_at + EVERY).min(now + EVERY * (BURST + 1)),
        );
        // Within the burst the result is `now`.
        full_at
            .checked_sub(EVERY * (BURST - 1))
            .map_or(now, |at| at.max(now))
    }

    /// Returns true if the call-back of this registration may begin. If the instance has answered
    /// before, its call-back may always begin, so that a flood of registrations with the instance's
    /// host cannot stop the call-backs to the instance.
    pub(super) fn has_place(&self, lease: &Lease) -> bool {
        let of_name = |call: &&Call| call.id == lease.instance.id;
        !lease.is_unproven()
            || self.under_way.iter().filter(of_name).count() < PER_NAME
                && lease.hosts().iter().flatten().all(|host| {
                    let to_host = |call: &&Call| call.hosts.iter().flatten().any(|one| one == host);
                    self.under_way.iter().filter(to_host).count() < PER_HOST
                })
    }

    /// Counts a call-back that begins.
    pub(super) fn begin(&mut self, lease: &Lease) {
        if lease.is_unproven() {
            self.under_way.push(Call {
                id: lease.instance.id.clone(),
                epoch: lease.instance.epoch,
                hosts: lease.hosts().map(|host| host.map(str::to_owned)),
            });
        }
    }

    /// Releases a call-back that has ended.
    pub(super) fn end(&mut self, id: &str, epoch: u64) {
        let is_it = |call: &Call| call.id == id && call.epoch == epoch;
        if let Some(at) = self.under_way.iter().position(is_it) {
            self.under_way.swap_remove(at);
        }
    }
}

/// Maximum number of call-backs in flight per id: one for the member and one for its candidate.
const PER_NAME: usize = 2;
/// Maximum number of call-backs in flight per host: enough for two deployments of eight GPUs with one
/// engine each. Each call-back ends within 4 s.
const PER_HOST: usize = 16;
/// Number of call-backs that the registrations of an id may cause at once: enough for one restart and a
/// few changes of readiness.
const BURST: u32 = 4;
/// Time between two call-backs beyond the burst.
const EVERY: Duration = Duration::from_secs(1);
