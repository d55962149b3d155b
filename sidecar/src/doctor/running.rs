//! Sidecars and proxies that run: their own state, and the state of their links.

use protocol::dlist::Memory;

use super::finding::{Results, kinds};
use super::pages::{self, Instance, Program, Running, Status};
use super::subject::Subject;
use super::together;
use crate::observe::status;
use crate::transport::expected_rate::{Ends, ExpectedRate};
use crate::transport::table;

kinds! {
    UNREACHED = Error "not-running":
        "the doctor was told to look at a program that does not answer";
        "start the program, or correct the URL: a sidecar's admin address, or the address at which the proxy listens for \
         clients";
    NOT_READY = Error "not-ready":
        "until the sidecar is ready, its engine computes its requests itself";
        "docs/troubleshooting.md explains each reason in the section `The sidecar is not ready`";
    UNMOVED = Warning "kv-unmoved":
        "the engine serves requests, but none of its KV is moved";
        "docs/models.md lists the models and caches whose KV is moved; the engine's log has the line";
    UNREGISTERED = Error "not-registered":
        "the proxy has not called this sidecar back, so it sends no requests to its engine";
        "check that the proxy reaches the sidecar's admin address, and that the sidecar names the registration port";
    SLOW_LINK = Warning "link-slow":
        "the link is slower than even the slowest wire of its kind, so it takes another way than you expect";
        "docs/troubleshooting.md explains the causes in the section `Transfers are slow`";
    QUARANTINE = Warning "slots-quarantined":
        "slots that a vanished sender may still write into are not used, so the buffer is smaller";
        "start the sender again on its own host with the same socket path (docs/troubleshooting.md)";
    INSTANCE = Error "instance-not-ready":
        "the proxy sends no requests to this instance";
        "docs/troubleshooting.md explains each state in the section `The proxy has no ready instance`";
    NO_ROLE = Error "role-missing":
        "without a prefill instance no KV is moved, and without a decode instance no request is served";
        "start an instance of this role, and let it register at this proxy";
    UNFIT = Warning "instance-unfit":
        "the proxy makes no pair with this instance, because its KV does not fit the others";
        "give both sides the same model, dtype, chunk size and number of ranks";
}

/// Looks at each program that the command line names, and then compares them.
pub(super) fn look(subject: &Subject<'_>, results: &mut Results) {
    let mut seen = Vec::new();
    for url in subject.at {
        match pages::read(url) {
            Ok(running) => {
                match &running.kind {
                    Program::Sidecar(status) => sidecar(&running, status, results),
                    Program::Proxy(instances) => proxy(&running, instances, results),
                }
                seen.push(running);
            }
            Err(problem) => results.add(&UNREACHED, problem),
        }
    }
    together::compare(&seen, results);
}

fn sidecar(running: &Running, status: &Status, results: &mut Results) {
    let at = format!("{} at {}", status.id.escape_debug(), running.url);
    results.fact(
        "running",
        format!("{} {at}, release {}", status.role, status.version),
    );
    for reason in &status.reasons {
        results.add(&NOT_READY, format!("{at}: {reason}"));
    }
    if let Some(reason) = &status.unmoved {
        results.add(&UNMOVED, format!("{at}: {reason}"));
    }
    if let Some(proxy) = status.proxy.as_ref().filter(|proxy| proxy.calls_back) {
        let limit = status::ACKNOWLEDGED_FOR.as_millis();
        let late = match proxy.acknowledged_ms_ago {
            None => Some("never".to_owned()),
            Some(ms) if u128::from(ms) > limit => Some(format!("for {ms} ms not")),
            Some(_) => None,
        };
        if let Some(late) = late {
            let seen = format!(
                "{at}: the proxy at {} has {late} called back",
                proxy.address
            );
            results.add(&UNREGISTERED, seen);
        }
    }
    for rank in status.ranks.iter().filter(|rank| rank.quarantined > 0) {
        let seen = format!(
            "{at}: {} slots of the {} of rank {}",
            rank.quarantined, rank.side, rank.rank
        );
        results.add(&QUARANTINE, seen);
    }
    for link in &status.links {
        let rate = link
            .measured_gb_per_s
            .map_or("not measured yet".to_owned(), |rate| {
                format!("{rate:.2} GB/s")
            });
        let (peer, why) = (link.peer.escape_debug(), link.why.escape_debug());
        results.fact(
            "running",
            format!("{at} to {peer}: {}, {rate} ({why})", link.transport),
        );
        let (Some(rate), Some(expected)) = (link.measured_gb_per_s, expected(&link.transport))
        else {
            continue;
        };
        if rate < expected.least_gb_s {
            let seen = format!(
                "{at} to {peer}: {} at {rate:.2} GB/s, and at least {:.1} are usual",
                link.transport, expected.least_gb_s
            );
            results.add_with(&SLOW_LINK, seen, expected.hint);
        }
    }
}

/// Returns the rate to expect from a link, whose memory the page does not show. So only transports that serve nothing but
/// GPU memory count as such.
fn expected(transport: &str) -> Option<ExpectedRate> {
    let kind = table::all().find(|kind| kind.as_str() == transport)?;
    let memory = if kind.needs_gpu() {
        Memory::Vram
    } else {
        Memory::Dram
    };
    let ends = Ends {
        ours: memory,
        theirs: memory,
        same_host: kind.needs_gpu(),
    };
    Some(ExpectedRate::of(kind, ends))
}

fn proxy(running: &Running, instances: &[Instance], results: &mut Results) {
    let url = &running.url;
    results.fact(
        "running",
        format!("proxy at {url} with {} instances", instances.len()),
    );
    for instance in instances {
        let id = instance.id.escape_debug();
        let standing = &instance.standing;
        if standing.state != "ready" {
            let reason = if standing.reason.is_empty() {
                String::new()
            } else {
                format!(": {}", standing.reason)
            };
            let seen = format!(
                "{url}: {} {id} is {}{reason}",
                instance.role, standing.state
            );
            results.add(&INSTANCE, seen);
        }
        if let Some(unfit) = &instance.unfit {
            results.add(&UNFIT, format!("{url}: {id}: {unfit}"));
        }
    }
    for role in ["prefill", "decode"] {
        let serves = |instance: &&Instance| instance.role == role || instance.role == "both";
        if !instances.iter().any(|instance| serves(&instance)) {
            results.add(&NO_ROLE, format!("{url} knows no {role} instance"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(page: &str) -> Vec<&'static str> {
        let status: Status = serde_json::from_str(page).unwrap();
        let running = Running {
            url: "http://x".to_owned(),
            skew: None,
            kind: Program::Proxy(Vec::new()),
        };
        let mut results = Results::default();
        sidecar(&running, &status, &mut results);
        results.codes()
    }

    /// These states need an engine, a slow network or a killed peer, so the test has the pages that a sidecar then shows.
    #[test]
    fn the_state_of_links_slots_and_engines_is_judged() {
        let page = |unmoved: &str, slots: u32, rate: &str| {
            format!(
                r#"{{"id": "a", "role": "sender", "version": "1", "reasons": [], "unmoved": {unmoved},
                    "ranks": [{{"side": "sender", "rank": 0, "quarantined": {slots}}}], "proxy": null,
                    "links": [{{"peer": "h:1", "transport": "tcp", "why": "configured", "measured_gb_per_s": {rate}}}]}}"#
            )
        };
        assert!(codes(&page("null", 0, "0.2")).is_empty());
        assert!(codes(&page("null", 0, "null")).is_empty());
        assert_eq!(codes(&page("null", 0, "0.05")), ["link-slow"]);
        assert_eq!(codes(&page("null", 3, "4.0")), ["slots-quarantined"]);
        assert_eq!(codes(&page("\"encoder\"", 0, "4.0")), ["kv-unmoved"]);
    }
}
