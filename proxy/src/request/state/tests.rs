use super::*;

const TRANSFER: Result<(), Alone> = Ok(());
const WHY: Alone = Alone::PrefillDied;

fn decoding(transfer: Result<(), Alone>, attempt: u32) -> Life {
    Life::Decoding { transfer, attempt }
}

#[test]
fn beginnings() {
    assert_eq!(Life::begin(Ok(())), (Life::Prefilling, Action::Wait));
    assert_eq!(
        Life::begin(Err(Alone::ManyPrompts)),
        (
            decoding(Err(Alone::ManyPrompts), 1),
            Action::SendDecode(Err(Alone::ManyPrompts))
        )
    );
}

#[test]
fn steps() {
    let check = |from: Life, event: Event, to: Life, action: Action| {
        let mut life = from;
        assert_eq!((life.on(event), life), (action, to), "{from:?} {event:?}");
    };
    let prefilling = Life::Prefilling;
    let sent = decoding(TRANSFER, 1);
    let send = Action::SendDecode(TRANSFER);
    check(prefilling, Event::Begun, sent, send);
    check(prefilling, Event::PrefillAnswered, sent, send);
    check(
        prefilling,
        Event::PrefillRefused,
        Life::Ended(Outcome::Refused),
        Action::PassRefusal,
    );
    check(
        prefilling,
        Event::PrefillFailed(WHY),
        decoding(Err(WHY), 1),
        Action::SendDecode(Err(WHY)),
    );

    // The end of the prefill leg is only noted once the decode leg is out.
    for life in [sent, decoding(Err(WHY), 1), Life::Streaming] {
        for event in [
            Event::Begun,
            Event::PrefillAnswered,
            Event::PrefillRefused,
            Event::PrefillFailed(WHY),
        ] {
            check(life, event, life, Action::Wait);
        }
    }
    // A leg that was sent along with it would wait for nobody.
    let lost = Event::PrefillLost(WHY);
    let alone = decoding(Err(WHY), 1);
    check(sent, lost, alone, Action::SendDecode(Err(WHY)));
    for life in [prefilling, alone, Life::Streaming] {
        check(life, lost, life, Action::Wait);
    }
    check(sent, Event::FirstByte, Life::Streaming, Action::Relay);
    check(
        sent,
        Event::DecodeFailed { another: true },
        decoding(Err(Alone::DecodeRetry), 2),
        Action::SendDecode(Err(Alone::DecodeRetry)),
    );
    check(
        sent,
        Event::DecodeFailed { another: false },
        Life::Ended(Outcome::Failed),
        Action::Fail,
    );
    check(
        Life::Streaming,
        Event::AnswerEnded,
        Life::Ended(Outcome::Done),
        Action::Finish,
    );
    check(
        Life::Streaming,
        Event::AnswerBroke,
        Life::Ended(Outcome::Broken),
        Action::Finish,
    );
}

#[test]
fn every_state_can_be_left_and_none_after_the_end() {
    for life in [Life::Prefilling, decoding(TRANSFER, 1), Life::Streaming] {
        let mut left = life;
        assert_eq!(left.on(Event::ClientLeft), Action::Finish);
        assert_eq!(left.outcome(), Some(Outcome::ClientLeft));
        let mut cut = life;
        assert_ne!(cut.on(Event::CutOff), Action::Wait);
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
            Event::CutOff,
        ] {
            let mut life = Life::Ended(outcome);
            assert_eq!(
                (life.on(event), life.outcome()),
                (Action::Wait, Some(outcome))
            );
        }
    }
}
