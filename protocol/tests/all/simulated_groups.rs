//! Scenarios of models with several groups of layers, over bad networks. The documentation of
//! [`world`] lists the checks of each run. The property test of `simulated` also has such models.

use std::cell::Cell;

use crate::world::{Fault, Model, NetPlan, Outcome, Park, Plan, RequestPlan, plan, run};
use protocol::Reason;

/// Returns requests of all kinds: parked early and late, with tokens at the decode side, and kept.
fn requests(kept: bool) -> Vec<RequestPlan> {
    (0..6u16)
        .map(|i| RequestPlan {
            reserve_at_ms: Some(20 * i),
            park: match i % 3 {
                _ if kept => Park::AtMs(5),
                0 => Park::AtMs(0),
                1 => Park::OnProgress(10),
                _ => Park::OnNotify(10),
            },
            have: if i % 2 == 0 { 0 } else { 55 },
            kept,
            queue_ms: 30,
            ..RequestPlan::simple(&format!("r{i}"), 17 + 5 * u32::from(i))
        })
        .collect()
}

/// Runs a plan with each model with groups, for requests that name their receiver and for kept
/// requests. Returns the number of delivered requests.
fn each(plan: impl Fn(Model, Vec<RequestPlan>) -> Plan, check: impl Fn(&Outcome)) -> usize {
    let mut delivered = 0;
    for model in Model::GROUPED {
        for kept in [false, true] {
            let outcome = run(&plan(model, requests(kept)));
            check(&outcome);
            delivered += outcome.delivered;
        }
    }
    delivered
}

#[test]
fn every_part_is_delivered() {
    let with = |model, requests| Plan {
        model,
        send_slots: 20,
        land_slots: 20,
        ..plan(requests)
    };
    each(with, |outcome| {
        assert_eq!((outcome.delivered, outcome.pushed), (7, 7), "{outcome:?}");
        assert_eq!(outcome.quarantined, 0);
    });
}

/// Tokens and states of any size pass through two slots, because both sides wait for one chunk
/// after the other.
#[test]
fn two_slots_are_enough_for_parked_requests() {
    for seed in 0..20 {
        let with = |model, mut requests: Vec<RequestPlan>| {
            for request in &mut requests {
                request.park = Park::AtMs(0);
            }
            Plan {
                seed,
                model,
                send_slots: 2,
                land_slots: 2,
                ..plan(requests)
            }
        };
        each(with, |outcome| {
            assert_eq!((outcome.delivered, outcome.pushed), (7, 7), "{outcome:?}");
        });
    }
}

/// A request that does not park needs all its slots at once. The slots of its state count, and its
/// empty chunks do not.
#[test]
fn an_unparked_request_needs_slots_for_its_state_but_not_for_empty_chunks() {
    let check = |model, land_slots, pushed, tokens| {
        let request = RequestPlan {
            park: Park::OnNotify(10),
            overlap: false,
            ..RequestPlan::simple("r", tokens)
        };
        let outcome = run(&Plan {
            model,
            land_slots,
            ..plan(vec![request])
        });
        // The other request is the last of each run.
        let too_large = outcome.failed.contains(&Reason::TooLarge);
        assert_eq!(
            (outcome.pushed, too_large),
            (if pushed { 2 } else { 1 }, !pushed),
            "{model:?}, {land_slots} slots: {outcome:?}"
        );
    };
    for (model, slots, tokens) in [
        (Model::Plain, 2, 8),
        (Model::Hybrid, 2 + 3, 8),
        (Model::States, 1, 8),
        (Model::WindowsOnly, 3, 40),
        (Model::Windows, 10, 40),
    ] {
        check(model, slots, true, tokens);
        if slots > 1 {
            check(model, slots - 1, false, tokens);
        }
    }
}

#[test]
fn loss_delay_and_duplication_cost_time_only() {
    let mut delivered = 0;
    for seed in 0..30 {
        let net = NetPlan {
            lost: 10,
            doubled: 20,
            delay_ms: 40,
        };
        let with = |model, requests| Plan {
            seed,
            model,
            net: net.clone(),
            send_slots: 20,
            land_slots: 20,
            ..plan(requests)
        };
        // `NoLink` is the end of a fetch whose message was lost.
        delivered += each(with, |outcome| {
            let known = |reason: &Reason| matches!(reason, Reason::NoLink | Reason::NoRoom);
            assert!(outcome.failed.iter().all(known), "{outcome:?}");
        });
    }
    let all = 30 * 2 * 7 * Model::GROUPED.len();
    assert!(delivered * 100 >= all * 95, "{delivered} of {all}");
}

#[test]
fn either_side_dies_at_any_time() {
    for ms in (0..400).step_by(25) {
        for fault in [
            Fault::KillSender,
            Fault::KillReceiver,
            Fault::SwapReceiver,
            Fault::KillPrefill,
            Fault::KillDecode,
            Fault::Disconnect,
            Fault::Partition(800),
        ] {
            let with = |model, requests| Plan {
                seed: u64::from(ms),
                model,
                guarded: ms % 2 == 0,
                faults: vec![(ms, fault)],
                ..plan(requests)
            };
            each(with, |outcome| {
                assert!(outcome.delivered >= 1, "{outcome:?}")
            });
        }
    }
}

/// A write that lands long after its failure changes no slot of another request, whatever groups
/// the chunk has.
#[test]
fn a_late_write_quarantines_its_own_slots_only() {
    let (quarantined, mut delivered) = (Cell::new(0), 0);
    for seed in 0..10 {
        for fault in [Fault::LoseWrite, Fault::FailWrite, Fault::CorruptWrite] {
            let with = |model, requests| Plan {
                seed,
                model,
                land_slots: 24,
                faults: vec![(60, fault)],
                ..plan(requests)
            };
            delivered += each(with, |outcome| {
                let own = outcome.quarantined <= outcome.lost_pieces;
                assert!(own && outcome.delivered >= 4, "{outcome:?}");
                quarantined.set(quarantined.get() + outcome.quarantined);
            });
        }
    }
    assert!(quarantined.get() > 0, "no write was late");
    let all = 10 * 3 * 2 * 7 * Model::GROUPED.len();
    assert!(delivered * 100 >= all * 80, "{delivered} of {all}");
}

#[test]
fn engines_give_up_and_ids_come_again() {
    for ms in (0..300).step_by(20) {
        let with = |model, mut requests: Vec<RequestPlan>| {
            requests[0].cancel_after_ms = Some(ms);
            requests[1].abort_after_ms = Some(ms);
            requests[3].twice_ms = Some(ms);
            Plan {
                seed: u64::from(ms),
                model,
                again_ms: Some(1500 + ms),
                faults: vec![(ms, Fault::Stranger)],
                ..plan(requests)
            }
        };
        each(with, |outcome| {
            assert!(outcome.delivered >= 4, "{outcome:?}")
        });
    }
}
