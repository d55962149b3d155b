//! Named scenarios of a pair of sidecars over bad networks. The documentation of [`world`] lists
//! the checks that each scenario makes.

use crate::world::{Attack, Fault, NetPlan, Park, Plan, RequestPlan, plan, run};
use proptest::prelude::*;
use protocol::Reason;

fn some_requests(n: usize) -> Vec<RequestPlan> {
    (0..n)
        .map(|i| RequestPlan {
            reserve_at_ms: Some(u16::try_from(20 * i).unwrap()),
            park: Park::OnProgress(10),
            ..RequestPlan::simple(&format!("r{i}"), 30)
        })
        .collect()
}

#[test]
fn a_clean_run_delivers_everything() {
    let outcome = run(&plan(some_requests(6)));
    assert_eq!((outcome.delivered, outcome.pushed), (7, 7), "{outcome:?}");
    assert_eq!(outcome.quarantined, 0);
}

/// LMCache's proxy counts from 1 at each start, so the same ids come again.
#[test]
fn ids_that_come_again_are_delivered_again() {
    let outcome = run(&Plan {
        again_ms: Some(2000),
        ..plan(some_requests(6))
    });
    assert_eq!((outcome.delivered, outcome.pushed), (13, 13), "{outcome:?}");
    assert_eq!(outcome.quarantined, 0);
}

#[test]
fn ids_that_come_again_survive_loss_and_restarts() {
    let mut delivered = 0;
    for seed in 0..60 {
        let net = NetPlan {
            lost: 10,
            doubled: 20,
            delay_ms: 40,
        };
        let fault = match seed % 3 {
            0 => Fault::KillSender,
            1 => Fault::Disconnect,
            _ => Fault::Stranger,
        };
        let outcome = run(&Plan {
            seed,
            net,
            again_ms: Some(300 + 20 * u16::try_from(seed).unwrap()),
            faults: vec![(150, fault), (400, fault)],
            ..plan(some_requests(6))
        });
        delivered += outcome.delivered;
    }
    assert!(delivered > 60 * 7, "{delivered} of 780");
}

#[test]
fn a_window_of_two_chunks_is_enough_for_any_number() {
    for seed in 0..20 {
        let outcome = run(&Plan {
            seed,
            send_slots: 2,
            land_slots: 2,
            ..plan(some_requests(6))
        });
        assert_eq!((outcome.delivered, outcome.pushed), (7, 7), "{outcome:?}");
    }
}

#[test]
fn loss_delay_and_duplication_cost_time_only() {
    let (mut delivered, mut failed) = (0, 0);
    for seed in 0..100 {
        let net = NetPlan {
            lost: 10,
            doubled: 20,
            delay_ms: 40,
        };
        let outcome = run(&Plan {
            seed,
            net,
            ..plan(some_requests(4))
        });
        delivered += outcome.delivered;
        failed += outcome.failed.len();
    }
    // Three lost heartbeats in a row end a lease, which happens to one lease in a thousand.
    assert!(delivered >= 495, "{delivered} delivered, {failed} failed");
}

#[test]
fn either_sidecar_dies_at_any_time() {
    for ms in (0..400).step_by(5) {
        for fault in [Fault::KillSender, Fault::KillReceiver, Fault::SwapReceiver] {
            for guarded in [false, true] {
                let outcome = run(&Plan {
                    seed: u64::from(ms),
                    guarded,
                    faults: vec![(ms, fault)],
                    ..plan(some_requests(4))
                });
                assert!(outcome.delivered >= 1, "{outcome:?}");
            }
        }
    }
}

/// One request makes a new handshake while another request still has a lease from the earlier
/// receiver. The new link leads to other memory, in which the old lease has no slots.
#[test]
fn a_lease_does_not_outlive_its_link() {
    for ms in 0..60 {
        let mut requests = some_requests(3);
        requests[1].reserve_at_ms = Some(ms);
        for request in &mut requests {
            request.step = 1;
        }
        run(&Plan {
            seed: u64::from(ms),
            faults: vec![(ms, Fault::SwapReceiver)],
            ..plan(requests)
        });
    }
}

#[test]
fn either_engine_dies_at_any_time() {
    for ms in (0..400).step_by(5) {
        for fault in [Fault::KillPrefill, Fault::KillDecode] {
            let outcome = run(&Plan {
                seed: u64::from(ms),
                faults: vec![(ms, fault)],
                ..plan(some_requests(4))
            });
            assert!(outcome.delivered >= 1, "{outcome:?}");
        }
    }
}

#[test]
fn the_connection_breaks_at_any_time() {
    for ms in (0..400).step_by(5) {
        for fault in [
            Fault::Disconnect,
            Fault::Partition(800),
            Fault::Partition(15_000),
        ] {
            run(&Plan {
                seed: u64::from(ms),
                faults: vec![(ms, fault)],
                ..plan(some_requests(4))
            });
        }
    }
}

#[test]
fn a_lost_write_quarantines_and_a_failed_one_does_not() {
    for (fault, expected) in [(Fault::FailWrite, false), (Fault::LoseWrite, true)] {
        let mut quarantined = false;
        for seed in 0..50 {
            let outcome = run(&Plan {
                seed,
                // Most chunks have a slot at the receiver but no send slot when the write is lost.
                send_slots: 2,
                faults: vec![(0, fault)],
                ..plan(some_requests(3))
            });
            let failed = outcome.failed.contains(&Reason::TransferFailed);
            assert!(failed, "{outcome:?}");
            let only_its_own = outcome.quarantined <= outcome.lost_pieces;
            assert!(only_its_own, "{outcome:?}");
            quarantined |= outcome.quarantined > 0;
        }
        assert_eq!(quarantined, expected);
    }
}

#[test]
fn a_liar_costs_others_time_only() {
    for seed in 0..200 {
        let outcome = run(&Plan {
            seed,
            faults: (0..10).map(|i| (30 * i, Fault::Stranger)).collect(),
            ..plan(some_requests(4))
        });
        assert_eq!((outcome.delivered, outcome.pushed), (5, 5), "{outcome:?}");
    }
}

#[test]
fn corrupt_data_is_not_shown_and_draining_ends_what_is_under_way() {
    for ms in (0..200).step_by(10) {
        let outcome = run(&Plan {
            seed: u64::from(ms),
            faults: vec![(ms, Fault::CorruptWrite)],
            ..plan(some_requests(3))
        });
        let bad = outcome.failed.iter().filter(|r| **r == Reason::BadSum);
        assert!(bad.count() <= 1 && outcome.delivered >= 3, "{outcome:?}");

        let outcome = run(&Plan {
            seed: u64::from(ms),
            faults: vec![(ms, Fault::Drain)],
            ..plan(some_requests(3))
        });
        let refused = |reason: &Reason| matches!(reason, Reason::Draining | Reason::NoSender);
        assert!(outcome.failed.iter().all(refused), "{outcome:?}");
    }
}

#[test]
fn engines_give_up_at_any_time() {
    for ms in (0..300).step_by(3) {
        let mut requests = some_requests(4);
        requests[0].cancel_after_ms = Some(ms);
        requests[1].abort_after_ms = Some(ms);
        requests[2].park = Park::OnNotify(5);
        requests[2].overlap = false;
        requests[3].park = Park::Never;
        run(&Plan {
            seed: u64::from(ms),
            ..plan(requests)
        });
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_plan_ends_with_no_slot_held(plan in crate::world::plans()) {
        run(&plan);
    }
}

/// An attacker on the path of the data changes, exchanges and repeats pieces. No chunk with wrong bytes is shown, and a new
/// data connection goes on.
#[test]
fn an_attacker_on_the_path_costs_time_only() {
    let attacked = |attack, seed, verifies| Plan {
        seed,
        guarded: true,
        verifies,
        send_slots: 3,
        land_slots: 3,
        faults: (0..6).map(|i| (60 * i, Fault::Attack(attack))).collect(),
        ..plan(some_requests(4))
    };
    for attack in [Attack::Change, Attack::Exchange, Attack::Repeat] {
        let mut delivered = 0;
        for seed in 0..60 {
            delivered += run(&attacked(attack, seed, true)).delivered;
        }
        // An attack ends the request whose write it hits. The last request of each run meets no attack.
        assert!(delivered >= 60, "{attack:?}: {delivered}");
        // Without the check of the tags, the simulation notices wrong bytes. So its own checks are not blind.
        let seen = (0..60)
            .any(|seed| std::panic::catch_unwind(|| run(&attacked(attack, seed, false))).is_err());
        assert!(seen, "{attack:?} is not noticed without tags");
    }
}
