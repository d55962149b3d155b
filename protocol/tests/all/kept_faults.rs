//! Tests kept KV over bad networks: the decode side fetches the KV that the prefill engine keeps.
//! [`world`] lists the checks of each run. The property test of `simulated` also has kept requests.

use crate::world::{Fault, NetPlan, Park, Plan, RequestPlan, plan, run};
use protocol::Reason;

fn kept_requests(n: usize) -> Vec<RequestPlan> {
    (0..n)
        .map(|i| RequestPlan {
            reserve_at_ms: Some(u16::try_from(20 * i).unwrap()),
            park: Park::AtMs(5),
            kept: true,
            queue_ms: 30,
            ..RequestPlan::simple(&format!("r{i}"), 30)
        })
        .collect()
}

#[test]
fn a_clean_run_fetches_everything() {
    let outcome = run(&plan(kept_requests(6)));
    assert_eq!((outcome.delivered, outcome.pushed), (7, 7), "{outcome:?}");
    assert_eq!(outcome.quarantined, 0);
}

/// Kept KV holds no send slot, so two slots on each side serve any number of requests.
#[test]
fn two_slots_are_enough_for_any_number() {
    for seed in 0..20 {
        let outcome = run(&Plan {
            seed,
            send_slots: 2,
            land_slots: 2,
            ..plan(kept_requests(6))
        });
        assert_eq!((outcome.delivered, outcome.pushed), (7, 7), "{outcome:?}");
    }
}

/// The queue is longer than the 4 s for which KV is kept, so `Renew` has to extend this time.
#[test]
fn a_queued_request_keeps_its_kv_alive_up_to_the_limit() {
    for (queue_ms, delivered) in [(3000, 5), (15_000, 5), (26_000, 1)] {
        let mut requests = kept_requests(4);
        for request in &mut requests {
            request.queue_ms = queue_ms;
        }
        let outcome = run(&plan(requests));
        assert_eq!(outcome.delivered, delivered, "{queue_ms} ms: {outcome:?}");
        let late = |reason: &Reason| matches!(reason, Reason::Deadline | Reason::NoSender);
        assert!(outcome.failed.iter().all(late), "{outcome:?}");
    }
}

#[test]
fn a_decode_request_that_never_comes_costs_the_lease_only() {
    let mut requests = kept_requests(4);
    for request in &mut requests {
        request.park = Park::Never;
    }
    let outcome = run(&plan(requests));
    assert_eq!((outcome.delivered, outcome.pushed), (1, 1), "{outcome:?}");
}

#[test]
fn a_decode_request_that_comes_twice_is_served_once() {
    for ms in (0..400).step_by(20) {
        let mut requests = kept_requests(4);
        for request in &mut requests {
            request.twice_ms = Some(ms);
        }
        let outcome = run(&plan(requests));
        assert_eq!(outcome.pushed, 5, "{outcome:?}");
        assert_eq!(outcome.delivered, 5, "{outcome:?}");
        let other = |r: &Reason| matches!(r, Reason::Duplicate | Reason::NoSender);
        assert!(outcome.failed.iter().all(other), "{outcome:?}");
    }
}

/// The KV of the first prefill request has no decode request. The other KV arrives nevertheless,
/// although all KV together needs more slots than there are.
#[test]
fn a_prefill_request_that_is_sent_again_costs_the_lease_only() {
    for seed in 0..20 {
        let mut requests = kept_requests(6);
        for request in requests.iter_mut().step_by(2) {
            request.park = Park::Never;
        }
        let outcome = run(&Plan {
            seed,
            send_slots: 2,
            land_slots: 2,
            ..plan(requests)
        });
        assert_eq!((outcome.delivered, outcome.pushed), (4, 4), "{outcome:?}");
    }
}

/// The router sends the decode request again, because the client of the first one is gone or the
/// first one's engine has died.
#[test]
fn a_decode_request_that_is_sent_again_after_an_abort_or_a_death() {
    let mut delivered = 0;
    for ms in (0..400).step_by(10) {
        let mut aborted = kept_requests(4);
        for request in &mut aborted {
            request.abort_after_ms = Some(ms);
            request.twice_ms = Some(200);
        }
        run(&Plan {
            seed: u64::from(ms),
            ..plan(aborted)
        });

        let mut again = kept_requests(4);
        for request in &mut again {
            request.twice_ms = Some(600);
        }
        let outcome = run(&Plan {
            seed: u64::from(ms),
            faults: vec![(ms, Fault::KillDecode)],
            ..plan(again)
        });
        delivered += outcome.delivered;
        // The KV that is being fetched when the engine dies is lost; the second request is told so.
        let told =
            |r: &Reason| matches!(r, Reason::Unwanted | Reason::Duplicate | Reason::EngineGone);
        assert!(outcome.failed.iter().all(told), "{ms} ms: {outcome:?}");
    }
    assert!(delivered >= 40 * 4, "{delivered} of 200");
}

#[test]
fn loss_delay_and_duplication_of_fetches_cost_time_only() {
    let (mut delivered, mut failed) = (0, Vec::new());
    for seed in 0..100 {
        let net = NetPlan {
            lost: 10,
            doubled: 20,
            delay_ms: 40,
        };
        let outcome = run(&Plan {
            seed,
            net,
            ..plan(kept_requests(4))
        });
        delivered += outcome.delivered;
        failed.extend(outcome.failed);
    }
    // The simulation reports one quarter of the lost messages to a fetch port as a lost connection.
    // A lost connection ends a parked request.
    assert!(delivered >= 470, "{delivered} delivered, {failed:?}");
}

#[test]
fn either_sidecar_or_engine_dies_at_any_time() {
    for ms in (0..400).step_by(5) {
        for fault in [
            Fault::KillSender,
            Fault::KillReceiver,
            Fault::SwapReceiver,
            Fault::KillPrefill,
            Fault::KillDecode,
        ] {
            for guarded in [false, true] {
                let outcome = run(&Plan {
                    seed: u64::from(ms),
                    guarded,
                    faults: vec![(ms, fault)],
                    ..plan(kept_requests(4))
                });
                assert!(outcome.delivered >= 1, "{outcome:?}");
            }
        }
    }
}

#[test]
fn connections_and_writes_fail_at_any_time() {
    for ms in (0..400).step_by(5) {
        for fault in [
            Fault::Disconnect,
            Fault::Partition(800),
            Fault::Partition(15_000),
            Fault::LoseWrite,
            Fault::Drain,
            Fault::Stranger,
        ] {
            run(&Plan {
                seed: u64::from(ms),
                faults: vec![(ms, fault)],
                ..plan(kept_requests(4))
            });
        }
    }
}

/// A process that has no token guesses tokens and sends false messages. No request loses its KV by
/// this.
#[test]
fn strangers_on_the_fetch_port_change_nothing() {
    for seed in 0..100 {
        let outcome = run(&Plan {
            seed,
            faults: (0..10).map(|i| (30 * i, Fault::Stranger)).collect(),
            ..plan(kept_requests(4))
        });
        assert_eq!((outcome.delivered, outcome.pushed), (5, 5), "{outcome:?}");
    }
}

#[test]
fn engines_give_kept_requests_up_at_any_time() {
    for ms in (0..300).step_by(3) {
        let mut requests = kept_requests(4);
        requests[0].cancel_after_ms = Some(ms);
        requests[1].abort_after_ms = Some(ms);
        requests[2].abort_after_ms = Some(ms);
        requests[2].queue_ms = 150;
        requests[3].queue_ms = 250;
        run(&Plan {
            seed: u64::from(ms),
            ..plan(requests)
        });
    }
}
