//! Replays a run between two real engines, recorded with `sidecar --trace`: the state machines must
//! return the same actions.
//!
//! The recordings are in `fixtures/traces`; `tests/record_traces.py` in the root folder of the
//! repository makes them. This test fails if a change of the code changes a state machine's actions
//! on real input. If the change is intended, record the traces again.

use std::fs;
use std::path::Path;

use protocol::{Time, receiver, sender};
use serde::Deserialize;

/// Line of a trace, as `sidecar/src/rank/recorder.rs` writes it.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Sender(sender::Config),
    Receiver(receiver::Config),
    SenderEvent(Time, sender::Event),
    ReceiverEvent(Time, receiver::Event),
    SenderAction(sender::Action),
    ReceiverAction(receiver::Action),
}

#[derive(Deserialize)]
struct Ranked {
    rank: u32,
    #[serde(flatten)]
    line: Line,
}

#[derive(Default)]
struct Replay {
    sender: Option<sender::Sender>,
    receiver: Option<receiver::Receiver>,
    events: usize,
    actions: usize,
    written: usize,
}

impl Replay {
    fn line(&mut self, at: usize, line: Line) {
        match line {
            Line::Sender(config) => self.sender = Some(sender::Sender::new(config)),
            Line::Receiver(config) => self.receiver = Some(receiver::Receiver::new(config)),
            Line::SenderEvent(now, event) => {
                let machine = self.sender.as_mut().expect("a configuration comes first");
                assert_eq!(
                    machine.poll_action(),
                    None,
                    "line {at}: an action was not recorded"
                );
                machine.handle(now, event);
                self.events += 1;
            }
            Line::ReceiverEvent(now, event) => {
                let machine = self.receiver.as_mut().expect("a configuration comes first");
                assert_eq!(
                    machine.poll_action(),
                    None,
                    "line {at}: an action was not recorded"
                );
                machine.handle(now, event);
                self.events += 1;
            }
            Line::SenderAction(action) => {
                self.written += usize::from(matches!(action, sender::Action::Write { .. }));
                let machine = self.sender.as_mut().expect("a configuration comes first");
                assert_eq!(machine.poll_action(), Some(action), "line {at}");
                self.actions += 1;
            }
            Line::ReceiverAction(action) => {
                self.written += usize::from(matches!(action, receiver::Action::Ready(..)));
                let machine = self.receiver.as_mut().expect("a configuration comes first");
                assert_eq!(machine.poll_action(), Some(action), "line {at}");
                self.actions += 1;
            }
        }
    }
}

fn replay(name: &str) -> Replay {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/traces")
        .join(name);
    let text = fs::read_to_string(&path).expect("the recording is part of the repository");
    let mut replay = Replay::default();
    for (at, line) in (1..).zip(text.lines()) {
        let ranked: Ranked = serde_json::from_str(line).expect("a line of a trace");
        assert_eq!(ranked.rank, 0, "the recorded run has one rank");
        replay.line(at, ranked.line);
    }
    replay
}

#[test]
fn a_recorded_sender_does_the_same_again() {
    let replay = replay("sender.jsonl");
    assert!(replay.events > 50 && replay.actions > 50 && replay.written > 5);
}

#[test]
fn a_recorded_receiver_does_the_same_again() {
    let replay = replay("receiver.jsonl");
    assert!(replay.events > 50 && replay.actions > 50 && replay.written > 5);
}
