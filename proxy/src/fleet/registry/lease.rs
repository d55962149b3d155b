//! The lease of a registration.

use std::time::{Duration, Instant};

use protocol::registration::Register;

use crate::fleet::instance::Instance;

/// One registration with its lease and its call-backs.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) instance: Instance,
    /// End of the lease; `None` if the registration stays until it is removed.
    pub(super) expires: Option<Instant>,
    /// Time at which the next call-back is due.
    pub(super) call_at: Instant,
    /// True while a call-back is in flight.
    pub(super) calling: bool,
    /// Readiness that the sidecar gave in its last `Register`. A change causes a call-back at once.
    pub(super) said_ready: bool,
    /// Time of the last answer with this id and epoch; `None` before the first answer.
    pub(super) answered: Option<Instant>,
    /// The reason why the last call-back failed; empty if it did not fail.
    pub(super) trouble: String,
}

impl Lease {
    /// Returns true for a registration from the network that no call-back has confirmed yet.
    pub(super) fn is_unproven(&self) -> bool {
        self.expires.is_some() && self.answered.is_none()
    }

    /// Returns the hosts to which a call-back connects: the host of the admin server and, if it
    /// differs, the host of the engine.
    pub(super) fn hosts(&self) -> [Option<&str>; 2] {
        let admin = self.instance.admin.as_ref().map(|admin| admin.host());
        let http = self.instance.http.host();
        [admin, (admin != Some(http)).then_some(http)]
    }

    /// Returns true if the lease has expired.
    pub(super) fn has_expired(&self, now: Instant) -> bool {
        self.expires.is_some_and(|at| at <= now)
    }
}

/// Returns true if the place holds a registration with this epoch.
pub(super) fn holds_epoch(place: &Option<Lease>, epoch: u64) -> bool {
    place
        .as_ref()
        .is_some_and(|lease| lease.instance.epoch == epoch)
}

/// Empties the place if it holds a registration with this epoch, and returns the registration.
pub(super) fn take_epoch(place: &mut Option<Lease>, epoch: u64) -> Option<Lease> {
    if holds_epoch(place, epoch) {
        place.take()
    } else {
        None
    }
}

/// Returns the length of the lease: three times the announced period. The period is limited: with a
/// period of 0 the lease would expire at once, and with a period of an hour a dead instance would stay
/// for hours.
pub(super) fn announced(message: &Register) -> Duration {
    let period = Duration::from_millis(u64::from(message.period_ms));
    period.clamp(SHORTEST_PERIOD, LONGEST_PERIOD) * MISSED_PERIODS
}

/// An instance counts as gone after this many missed heartbeats. The protocol fixes this number.
const MISSED_PERIODS: u32 = 3;
/// The shortest period. A shorter period counts as this period.
const SHORTEST_PERIOD: Duration = Duration::from_millis(100);
/// The longest period. A longer period counts as this period.
const LONGEST_PERIOD: Duration = Duration::from_secs(60);
