//! Tests one request over a perfect network: each message arrives once and in order, and only the
//! test advances the time.

use protocol::local::{Await, Computing, Release, Reserve, Staged, Target};
use protocol::plan::Chunking;
use protocol::receiver::{self, Receiver, Route};
use protocol::sender::{self, Sender};
use protocol::{EngineId, Epoch, Layout, RequestId, Time};

use crate::setup::group;

const CHUNK: u32 = 256;

fn layout() -> Layout {
    Layout {
        model: "m".into(),
        dtype: "float".into(),
        layers: 4,
        kv_heads: 2,
        head_size: 64,
        mla: false,
        chunk_tokens: CHUNK,
        ..Layout::example()
    }
}

fn pair(layout: &Layout, send_slots: u32, land_slots: u32) -> (Sender, Receiver) {
    let sender = Sender::new(sender::Config {
        layout: layout.clone(),
        ..crate::setup::sender(send_slots)
    });
    let receiver = Receiver::new(crate::setup::receiver_of(layout.clone(), land_slots));
    (sender, receiver)
}

fn check(
    tokens: u32,
    have: u32,
    send_slots: u32,
    land_slots: u32,
    park_first: bool,
    overlap: bool,
) {
    let slots = (send_slots, land_slots);
    check_of(&layout(), tokens, have, slots, park_first, overlap);
}

fn check_of(
    layout: &Layout,
    tokens: u32,
    have: u32,
    (send_slots, land_slots): (u32, u32),
    park_first: bool,
    overlap: bool,
) {
    let chunking = Chunking::of(layout);
    let (mut p, mut d) = pair(layout, send_slots, land_slots);
    let (pe, de) = (EngineId(1), EngineId(2));
    let to = Target {
        host: "h".into(),
        init_port: 1,
        alloc_port: 2,
    };
    let req = RequestId::from("r");
    let chunks = chunking.plan(tokens, 0).chunks();
    let keys: Vec<String> = (0..chunks).map(|i| format!("k{i}")).collect();
    let now = Time(1);
    let parked = Await {
        req: req.clone(),
        keys: keys.clone(),
        tokens,
        have_tokens: have,
        deadline_ms: 60_000,
        written: false,
        ..Await::example()
    };
    if park_first {
        d.handle(now, receiver::Event::Await(de, parked.clone()));
    }
    p.handle(
        now,
        sender::Event::Reserve(
            pe,
            Reserve {
                req: req.clone(),
                to: to.clone(),
                keys,
                tokens,
                upto: CHUNK.min(tokens),
                overlap,
                ..Reserve::example()
            },
        ),
    );
    let (mut p_ended, mut d_ended, mut late) = (None, None, !park_first);
    loop {
        let mut moved = false;
        while let Some(action) = p.poll_action() {
            moved = true;
            match action {
                sender::Action::Link { to } => p.handle(
                    now,
                    sender::Event::Linked {
                        to,
                        epoch: Epoch(2),
                        v: 1,
                        slots: land_slots,
                        cancels: false,
                        transport: "tcp".into(),
                    },
                ),
                sender::Action::Send { message, .. } => d.handle(
                    now,
                    receiver::Event::Peer {
                        route: Route(1),
                        message,
                    },
                ),
                sender::Action::Write { transfer, .. } => p.handle(
                    now,
                    sender::Event::Done {
                        transfer,
                        sums: vec![],
                        began: None,
                    },
                ),
                sender::Action::Granted(_, granted) => {
                    if !granted.chunks.is_empty() {
                        let staged = Staged {
                            req: granted.req,
                            chunks: granted.chunks,
                            gather_us: 1,
                            event: None,
                            layers: Vec::new(),
                            ..Staged::example()
                        };
                        p.handle(now, sender::Event::Staged(pe, staged));
                    }
                }
                sender::Action::Ended(_, ended) => p_ended = Some(ended),
                sender::Action::Progress(_)
                | sender::Action::Notify { .. }
                | sender::Action::Record(_)
                | sender::Action::Answer { .. }
                | sender::Action::Watch { .. } => {}
            }
        }
        while let Some(action) = d.poll_action() {
            moved = true;
            match action {
                receiver::Action::Send { message, .. } => p.handle(
                    now,
                    sender::Event::Peer {
                        to: to.clone(),
                        message,
                    },
                ),
                receiver::Action::Ready(_, ready) => d.handle(
                    now,
                    receiver::Event::Release(
                        de,
                        Release {
                            req: ready.req,
                            chunks: ready.chunks,
                            scatter_us: 1,
                            ..Release::example()
                        },
                    ),
                ),
                receiver::Action::Ended(_, ended) => d_ended = Some(ended),
                receiver::Action::Mark { .. } | receiver::Action::CheckCanary { .. } => {
                    unreachable!("nobody here is LMCache")
                }
                receiver::Action::Open { .. }
                | receiver::Action::Close { .. }
                | receiver::Action::Fence { .. }
                | receiver::Action::Ask { .. }
                | receiver::Action::Record(_) => {}
            }
        }
        if !moved {
            if late {
                late = false;
                d.handle(now, receiver::Event::Await(de, parked.clone()));
                continue;
            }
            let computing = Computing {
                req: req.clone(),
                upto: tokens,
                ..Computing::example()
            };
            if p_ended.is_some() {
                break;
            }
            let before = p.gauges();
            p.handle(now, sender::Event::Computing(pe, computing));
            assert!(
                p.gauges() != before || p_ended.is_some(),
                "stuck: {p:?} {d:?}"
            );
        }
    }
    let (p_ended, d_ended) = (p_ended.unwrap(), d_ended.unwrap());
    assert_eq!((p_ended.reason, d_ended.reason), (None, None));
    let known = if park_first || overlap { have } else { 0 };
    let plan = chunking.plan(tokens, known);
    let bytes: u64 = (0..chunks).map(|chunk| plan.size(chunk)).sum();
    if layout.groups.is_empty() {
        let all = u64::from(tokens - known) * layout.token_bytes().unwrap();
        assert_eq!(bytes, all);
    }
    assert_eq!((p_ended.bytes, d_ended.bytes), (bytes, bytes));
    assert!(p.is_idle() && d.is_idle(), "{p:?} {d:?}");
}

#[test]
fn every_chunk_arrives_once() {
    check(1, 0, 4, 4, true, true);
    check(1500, 0, 8, 8, true, true);
    check(1500, 300, 8, 8, true, true);
    check(1500, 1472, 8, 8, true, true);
}

#[test]
fn a_prompt_fits_any_buffer_of_two_chunks() {
    check(1500, 0, 2, 2, true, true);
    check(5000, 64, 2, 2, true, true);
}

#[test]
fn an_overlapped_request_waits_for_the_decode_side_to_say_what_it_has() {
    check(1500, 1472, 8, 8, false, true);
}

#[test]
fn data_may_come_before_the_decode_request() {
    check(1500, 0, 8, 8, false, false);
    check(1500, 1472, 8, 8, false, false);
}

#[test]
fn groups_of_layers_move_what_the_plan_says() {
    let with = |groups| Layout { groups, ..layout() };
    let layouts = [
        vec![group("full", 512, 0), group("window", 256, 400)],
        vec![group("full", 512, 0), group("state", 300_000, 0)],
        vec![group("state", 5000, 0), group("state", 7000, 0)],
        vec![group("window", 64, 300)],
        vec![group("chunked", 128, 512), group("full", 32, 0)],
    ];
    for groups in layouts {
        let layout = with(groups);
        for (tokens, have) in [(1, 0), (1500, 0), (1500, 300), (1500, 1472), (1536, 1300)] {
            for slots in [(8, 8), (2, 2)] {
                check_of(&layout, tokens, have, slots, true, true);
            }
            for overlap in [true, false] {
                check_of(&layout, tokens, have, (16, 16), false, overlap);
            }
        }
    }
}

/// A window of one token contains only the token that the decode side computes.
#[test]
fn a_request_of_which_nothing_moves_ends_well() {
    let nothing = Layout {
        groups: vec![group("window", 64, 1)],
        ..layout()
    };
    check_of(&nothing, 1500, 0, (8, 8), true, true);
    check_of(&nothing, 1500, 300, (8, 8), false, true);
    check_of(&nothing, 1500, 0, (8, 8), false, false);
}
