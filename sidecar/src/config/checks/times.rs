//! Reads the time limits of all waits, and checks that the limits fit together.

use std::time::Duration;

use super::value;
use crate::config::Times;
use crate::config::keys::{Lmcache, Sidecar};
use crate::config::layers::{Layers, Source, Sourced};
use crate::config::value::{Millis, Seconds, Value};

pub(super) fn times(layers: &mut Layers, lmcache: &Lmcache, sidecar: &Sidecar) -> Option<Times> {
    // Users of LMCache set these two times with LMCache's keys, in seconds. The sidecar's own keys take
    // precedence.
    let wait = fallback(
        layers,
        "wait_ms",
        sidecar.wait_ms.as_ref(),
        (
            "pd_allocation_timeout_sec",
            lmcache.pd_allocation_timeout_sec.as_ref(),
        ),
        Duration::from_secs(1),
    );
    let drain = fallback(
        layers,
        "drain_timeout_ms",
        sidecar.drain_timeout_ms.as_ref(),
        (
            "pd_shutdown_timeout_sec",
            lmcache.pd_shutdown_timeout_sec.as_ref(),
        ),
        Duration::from_secs(10),
    );
    // These keys are periods of timers: a period near 0 would keep one core busy.
    for (path, given) in [
        ("sidecar.heartbeat_ms", &sidecar.heartbeat_ms),
        ("sidecar.repeat_ms", &sidecar.repeat_ms),
        ("sidecar.link_ms", &sidecar.link_ms),
        ("sidecar.stall_ms", &sidecar.stall_ms),
        ("sidecar.max_lease_ms", &sidecar.max_lease_ms),
        ("sidecar.register_ms", &sidecar.register_ms),
    ] {
        if let Some(given) = given.as_ref().filter(|g| g.value.0 < MIN_PERIOD) {
            layers.wrong(
                path,
                given,
                "so short a period would keep a core busy",
                "write at least 10 (milliseconds)",
            );
        }
    }
    let times = Times {
        heartbeat: value(&sidecar.heartbeat_ms)?.0,
        wait,
        park: value(&sidecar.park_ms)?.0,
        repeat: value(&sidecar.repeat_ms)?.0,
        link: value(&sidecar.link_ms)?.0,
        stall: value(&sidecar.stall_ms)?.0,
        max_wait: value(&sidecar.max_wait_ms)?.0,
        no_sender: value(&sidecar.no_sender_ms)?.0,
        unclaimed: value(&sidecar.unclaimed_ms)?.0,
        max_lease: value(&sidecar.max_lease_ms)?.0,
        max_keep: value(&sidecar.max_keep_ms)?.0,
        fence: value(&sidecar.fence_ms)?.0,
        drain,
    };
    // The sidecar works with the combinations below, but it ends requests that could still succeed. So
    // each combination gets a warning, and is not a mistake.
    let lease = times.heartbeat * 3;
    if lease > times.max_lease {
        layers.warnings.push(format!(
            "three times heartbeat_ms is {} ms, longer than max_lease_ms ({}): a receiver with this max_lease_ms \
             ends leases of live senders; lower heartbeat_ms or raise max_lease_ms",
            lease.as_millis(),
            times.max_lease.as_millis()
        ));
    }
    if times.stall <= times.wait + times.park {
        layers.warnings.push(format!(
            "stall_ms ({}) is not longer than wait_ms and park_ms together ({}): requests that wait \
             for room end as stalled; raise stall_ms",
            times.stall.as_millis(),
            (times.wait + times.park).as_millis()
        ));
    }
    Some(times)
}

/// Returns the time of the sidecar's own key, otherwise LMCache's time if it is finite, otherwise the
/// default.
fn fallback(
    layers: &mut Layers,
    name: &str,
    ours: Option<&Sourced<Millis>>,
    theirs: (&str, Option<&Sourced<Seconds>>),
    default: Duration,
) -> Duration {
    let path = format!("sidecar.{name}");
    if let Some(ours) = ours {
        return ours.value.0;
    }
    let (time, source) = match theirs.1.and_then(|t| t.value.0) {
        Some(time) => (time, Source::Key(theirs.0.to_owned())),
        None => (default, Source::Default),
    };
    layers.computed(&path, Millis(time).show(), &source);
    time
}

const MIN_PERIOD: Duration = Duration::from_millis(10);
