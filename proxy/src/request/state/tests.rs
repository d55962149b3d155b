use super::*;

const TRANSFER: Result<(), Fallback> = Ok(());
const WHY: Fallback = Fallback::PrefillDied;

fn decoding(transfer: Result<(), Fallback>, attempt: u32) -> RequestState {
    RequestState::Decoding { transfer, attempt }
}

#[test]
fn beginnings() {
    assert_eq!(
        RequestState::begin(Ok(())),
        (RequestState::Prefilling, Action::Wait)
    );
    assert_eq!(
        RequestState::begin(Err(Fallback::ManyPrompts)),
        (
            decoding(Err(Fallback::ManyPrompts), 1),
            Action::SendDecode(Err(Fallback::ManyPrompts))
        )
    );
}

#[test]
fn steps() {
    let check = |from: RequestState, event: Event, to: RequestState, action: Action| {
        let mut state = from;
        assert_eq!((state.on(event), state), (action, to), "{from:?} {event:?}");
    };
    let prefilling = RequestState::Prefilling;
    let sent = decoding(TRANSFER, 1);
    let send = Action::SendDecode(TRANSFER);
    check(prefilling, Event::Begun, sent, send);
    check(prefilling, Event::PrefillAnswered, sent, send);
    check(
        prefilling,
        Event::PrefillRefused,
        RequestState::Ended(Outcome::Refused),
        Action::PassRefusal,
    );
    check(
        prefilling,
        Event::PrefillFailed(WHY),
        decoding(Err(WHY), 1),
        Action::SendDecode(Err(WHY)),
    );

    // After the decode leg is sent, the end of the prefill leg changes nothing.
    for state in [sent, decoding(Err(WHY), 1), RequestState::Streaming] {
        for event in [
            Event::Begun,
            Event::PrefillAnswered,
            Event::PrefillRefused,
            Event::PrefillFailed(WHY),
        ] {
            check(state, event, state, Action::Wait);
        }
    }
    // A decode leg that was sent together with the prefill leg now waits for KV that no sender sends.
    let lost = Event::PrefillLost(WHY);
    let alone = decoding(Err(WHY), 1);
    check(sent, lost, alone, Action::SendDecode(Err(WHY)));
    for state in [prefilling, alone, RequestState::Streaming] {
        check(state, lost, state, Action::Wait);
    }
    check(
        sent,
        Event::FirstByte,
        RequestState::Streaming,
        Action::PassAnswer,
    );
    check(
        sent,
        Event::DecodeFailed { another: true },
        decoding(Err(Fallback::DecodeRetry), 2),
        Action::SendDecode(Err(Fallback::DecodeRetry)),
    );
    check(
        sent,
        Event::DecodeFailed { another: false },
        RequestState::Ended(Outcome::Failed),
        Action::Fail,
    );
    check(
        RequestState::Streaming,
        Event::AnswerEnded,
        RequestState::Ended(Outcome::Done),
        Action::Finish,
    );
    check(
        RequestState::Streaming,
        Event::AnswerBroke,
        RequestState::Ended(Outcome::Broken),
        Action::Finish,
    );
}

#[test]
fn every_state_can_be_left_and_none_after_the_end() {
    for state in [
        RequestState::Prefilling,
        decoding(TRANSFER, 1),
        RequestState::Streaming,
    ] {
        let mut left = state;
        assert_eq!(left.on(Event::ClientLeft), Action::Finish);
        assert_eq!(left.outcome(), Some(Outcome::ClientLeft));
        let mut cut = state;
        assert_ne!(cut.on(Event::ForceShutdown), Action::Wait);
        assert!(cut.outcome().is_some());
    }
    for outcome in Outcome::ALL {
        for event in [
            Event::Begun,
            Event::PrefillAnswered,
            Event::PrefillRefused,
            Event::PrefillFailed(WHY),
            Event::FirstByte,
            Event::DecodeFailed { another: true },
            Event::DecodeFailed { another: false },
            Event::AnswerEnded,
            Event::AnswerBroke,
            Event::ClientLeft,
            Event::ForceShutdown,
        ] {
            let mut state = RequestState::Ended(outcome);
            assert_eq!(
                (state.on(event), state.outcome()),
                (Action::Wait, Some(outcome))
            );
        }
    }
}
