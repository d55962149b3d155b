//! The bound on call-backs: a registration names an address, and strangers register as fast as they like.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::lease::Lease;

/// Call-backs under way, and when a name's registrations may prompt the next one.
#[derive(Debug, Default)]
pub(super) struct Budget {
    under_way: Vec<Call>,
    /// By name, the instant at which its whole burst is available again.
    names: BTreeMap<String, Instant>,
}

#[derive(Debug)]
struct Call {
    id: String,
    epoch: u64,
    hosts: [Option<String>; 2],
}

impl Budget {
    /// Returns the earliest instant of a call-back that a registration of this name prompts.
    pub(super) fn prompted(&mut self, now: Instant, id: &str) -> Instant {
        self.names.retain(|_, full_at| *full_at > now);
        let full_at = self.names.get(id).copied().unwrap_or(now).max(now);
        self.names.insert(
            id.to_owned(),
            (full_at + EVERY).min(now + EVERY * (BURST + 1)),
        );
        // Within the burst this is now, or earlier.
        full_at
            .checked_sub(EVERY * (BURST - 1))
            .map_or(now, |at| at.max(now))
    }

    /// Returns true if the call-back of this registration may begin. An instance that has answered before
    /// always may: strangers that name its host must not make it miss its call-backs.
    pub(super) fn has_place(&self, lease: &Lease) -> bool {
        let of_name = |call: &&Call| call.id == lease.instance.id;
        !lease.is_unproven()
            || self.under_way.iter().filter(of_name).count() < PER_NAME
                && lease.hosts().iter().flatten().all(|host| {
                    let to_host = |call: &&Call| call.hosts.iter().flatten().any(|one| one == host);
                    self.under_way.iter().filter(to_host).count() < PER_HOST
                })
    }

    /// Notes that a call-back begins.
    pub(super) fn begin(&mut self, lease: &Lease) {
        if lease.is_unproven() {
            self.under_way.push(Call {
                id: lease.instance.id.clone(),
                epoch: lease.instance.epoch,
                hosts: lease.hosts().map(|host| host.map(str::to_owned)),
            });
        }
    }

    /// Notes that a call-back has ended.
    pub(super) fn end(&mut self, id: &str, epoch: u64) {
        let is_it = |call: &Call| call.id == id && call.epoch == epoch;
        if let Some(at) = self.under_way.iter().position(is_it) {
            self.under_way.swap_remove(at);
        }
    }
}

/// A member and its candidate.
const PER_NAME: usize = 2;
/// Eight GPUs, one engine each, of two deployments. Each call-back ends within 4 s.
const PER_HOST: usize = 16;
/// Call-backs that a name's registrations prompt at once: a restart, and a few changes of readiness.
const BURST: u32 = 4;
/// Time between two more.
const EVERY: Duration = Duration::from_secs(1);
