//! Checks that two engines that keep KV for each other do not stop. If kept KV may take only a
//! share of the blocks, every request ends quickly. Otherwise every request ends within the maximum
//! time for which KV is kept.

use proptest::prelude::*;

use crate::two_engines::{Job, MAX_KEEP_MS, Plan, run};

/// The blocks of each engine are full of KV for requests that wait in the queue of the other
/// engine.
fn cross(share: u32) -> Plan {
    let jobs = (0..4)
        .map(|index| Job {
            at_ms: index,
            prefill: usize::from(index % 2),
            chunks: 4,
        })
        .collect();
    Plan {
        seed: 1,
        jobs,
        blocks: 8,
        share,
        slots: 2,
    }
}

#[test]
fn engines_that_fill_each_other_with_kept_kv_go_on_at_the_limit() {
    let outcome = run(&cross(8));
    assert!(
        outcome.ended_ms > MAX_KEEP_MS / 2,
        "no deadlock to resolve: {outcome:?}"
    );
    assert!(outcome.ended_ms < 2 * MAX_KEEP_MS, "{outcome:?}");
    assert!(!outcome.failed.is_empty(), "{outcome:?}");
}

#[test]
fn a_share_of_the_blocks_prevents_the_deadlock() {
    let outcome = run(&cross(4));
    assert!(outcome.failed.is_empty(), "{outcome:?}");
    assert!(outcome.fetched >= 2, "{outcome:?}");
    assert!(outcome.ended_ms < 2000, "{outcome:?}");
}

/// One request is being fetched, and the KV of other requests is kept. Kept KV has no slots, so all
/// slots are free for the fetched request.
#[test]
fn kept_requests_do_not_take_the_slots_of_a_fetched_one() {
    let jobs = (0..6)
        .map(|index| Job {
            at_ms: 0,
            prefill: 0,
            chunks: 1 + index % 3,
        })
        .collect();
    let outcome = run(&Plan {
        seed: 3,
        jobs,
        blocks: 12,
        share: 12,
        slots: 1,
    });
    assert_eq!(outcome.fetched, 6, "{outcome:?}");
    assert!(outcome.ended_ms < 5000, "{outcome:?}");
}

fn jobs() -> impl Strategy<Value = Vec<Job>> {
    let job = (0..500u16, 0..2usize, 1..=4u32).prop_map(|(at_ms, prefill, chunks)| Job {
        at_ms,
        prefill,
        chunks,
    });
    proptest::collection::vec(job, 1..16)
}

proptest! {
    #[test]
    fn every_request_ends_whatever_the_engines_keep(
        seed in any::<u64>(),
        jobs in jobs(),
        blocks in 4..12u32,
        share in 0..12u32,
        slots in 1..6u32,
    ) {
        let rounds = jobs.len() as u64 + 1;
        let outcome = run(&Plan { seed, jobs, blocks, share: share.min(blocks), slots });
        prop_assert!(outcome.ended_ms < rounds * 2 * MAX_KEEP_MS, "{outcome:?}");
    }

    #[test]
    fn half_of_the_blocks_for_kept_kv_lets_every_fetch_succeed(
        seed in any::<u64>(),
        jobs in jobs(),
        slots in 1..6u32,
    ) {
        let outcome = run(&Plan { seed, jobs, blocks: 8, share: 4, slots });
        prop_assert!(outcome.failed.is_empty(), "{outcome:?}");
    }
}
