//! The states of a request: one enum, one function, no IO.
//!
//! ```text
//!               ┌────────────┐ begun, answered: send the decode leg  ┌──────────┐ first byte  ┌───────────┐
//!  with pair ──▶│ Prefilling │──────────────────────────────────────▶│ Decoding │────────────▶│ Streaming │
//!               └────────────┘ failed: send it without transfer      └──────────┘             └───────────┘
//!                     │ refused (4xx)                       fallback ──▶│    ▲ │ failed              │ ended,
//!                     ▼                                                 │    └─┘ another instance    ▼ broke
//!                  Ended ◀──────────────────────────────────────────────┴──────────────────────── Ended
//! ```
//!
//! * `Prefilling`: the prefill leg is sent, and its engine has not begun to compute. This state ends at
//!   the prefill timeout at the latest.
//! * `Decoding`: the decode leg is sent. No byte of the leg's answer has reached the client, so another
//!   instance can still take over. This state ends at the latest at the first-byte timeout, or at the answer
//!   timeout if the answer is not streamed.
//! * `Streaming`: bytes flow to the client. The idle timeout limits the time between two chunks.
//! * `Ended`: the request has an outcome. The client can leave in every state.

use crate::openai::fallback::Fallback;
use crate::telemetry::outcome::Outcome;

/// The state of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestState {
    /// The prefill leg is sent, and its engine has not begun to compute.
    Prefilling,
    /// The decode leg is sent, and its answer has not begun.
    Decoding {
        /// `Ok` if the decode leg waits for KV, otherwise the reason why it does not wait.
        transfer: Result<(), Fallback>,
        /// The number of decode legs sent so far, from 1.
        attempt: u32,
    },
    /// The answer flows to the client.
    Streaming,
    /// The request has ended.
    Ended(Outcome),
}

/// An event in the life of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The prefill engine has begun to compute the request.
    Begun,
    /// The prefill leg was answered with 2xx.
    PrefillAnswered,
    /// The prefill engine has refused the request as wrong (4xx).
    PrefillRefused,
    /// The prefill leg failed.
    PrefillFailed(Fallback),
    /// The prefill leg failed after the decode leg was sent, and before the prefill engine had begun.
    PrefillLost(Fallback),
    /// The first bytes of the decode leg's answer have come.
    FirstByte,
    /// The decode leg failed before its answer began.
    DecodeFailed {
        /// True if another instance can take the request.
        another: bool,
    },
    /// The answer is complete.
    AnswerEnded,
    /// The answer is complete, and refuses the request as wrong (4xx).
    AnswerRefused,
    /// The answer broke off.
    AnswerBroke,
    /// The client has left.
    ClientLeft,
    /// The proxy stops and does not wait for the request.
    ForceShutdown,
}

/// The action that follows an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Wait for the next event.
    Wait,
    /// Send the decode leg with a transfer, or without a transfer for the given reason.
    SendDecode(Result<(), Fallback>),
    /// Answer the client with the prefill engine's refusal.
    PassRefusal,
    /// Answer the client with the decode leg's answer.
    PassAnswer,
    /// Answer the client with an error.
    Fail,
    /// Drop both legs: the request has ended.
    Finish,
}

impl RequestState {
    /// Returns the first state of a request, and the first action: `Wait` if the caller has to send a prefill
    /// leg, otherwise `SendDecode`.
    pub(crate) fn begin(plan: Result<(), Fallback>) -> (Self, Action) {
        match plan {
            Ok(()) => (Self::Prefilling, Action::Wait),
            Err(why) => Self::decoding(Err(why), 1),
        }
    }

    /// Changes the state for an event, and returns the action that follows.
    pub(crate) fn on(&mut self, event: Event) -> Action {
        let (next, action) = self.after(event);
        *self = next;
        action
    }

    /// Returns the outcome; `None` if the request has not ended.
    pub(crate) fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Ended(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// Returns the state and the action that follow an event.
    fn after(self, event: Event) -> (Self, Action) {
        use Event as E;
        match (self, event) {
            (Self::Ended(_), _) => (self, Action::Wait),
            (_, E::ClientLeft) => (Self::Ended(Outcome::ClientLeft), Action::Finish),
            (Self::Streaming, E::ForceShutdown) => (Self::Ended(Outcome::Broken), Action::Finish),
            (_, E::ForceShutdown) => (Self::Ended(Outcome::Failed), Action::Fail),

            (Self::Prefilling, E::Begun | E::PrefillAnswered) => Self::decoding(Ok(()), 1),
            (Self::Prefilling, E::PrefillRefused) => {
                (Self::Ended(Outcome::Refused), Action::PassRefusal)
            }
            (Self::Prefilling, E::PrefillFailed(why)) => Self::decoding(Err(why), 1),

            // The decode leg waits for KV that no sender will send, so send it again without a transfer.
            (
                Self::Decoding {
                    transfer: Ok(()),
                    attempt,
                },
                E::PrefillLost(why),
            ) => Self::decoding(Err(why), attempt),
            (Self::Decoding { .. }, E::FirstByte) => (Self::Streaming, Action::PassAnswer),
            (Self::Decoding { attempt, .. }, E::DecodeFailed { another: true }) => {
                Self::decoding(Err(Fallback::DecodeRetry), attempt + 1)
            }
            (Self::Decoding { .. }, E::DecodeFailed { another: false }) => {
                (Self::Ended(Outcome::Failed), Action::Fail)
            }

            (Self::Streaming, E::AnswerEnded) => (Self::Ended(Outcome::Done), Action::Finish),
            (Self::Streaming, E::AnswerRefused) => (Self::Ended(Outcome::Refused), Action::Finish),
            (Self::Streaming, E::AnswerBroke) => (Self::Ended(Outcome::Broken), Action::Finish),

            // After the decode leg is sent, the end of the prefill leg changes nothing. If no KV comes, the
            // decode engine's own sidecar reports this to the engine, and the engine computes the prompt.
            (
                Self::Decoding { .. } | Self::Streaming,
                E::Begun
                | E::PrefillAnswered
                | E::PrefillRefused
                | E::PrefillFailed(_)
                | E::PrefillLost(_),
            ) => (self, Action::Wait),

            // In each state below, the events beside it cannot come.
            (
                Self::Prefilling,
                E::PrefillLost(_)
                | E::FirstByte
                | E::DecodeFailed { .. }
                | E::AnswerEnded
                | E::AnswerRefused
                | E::AnswerBroke,
            )
            | (Self::Decoding { .. }, E::AnswerEnded | E::AnswerRefused | E::AnswerBroke)
            | (Self::Streaming, E::FirstByte | E::DecodeFailed { .. }) => (self, Action::Wait),
        }
    }

    /// Returns the state `Decoding` with the action that sends its leg.
    fn decoding(transfer: Result<(), Fallback>, attempt: u32) -> (Self, Action) {
        (
            Self::Decoding { transfer, attempt },
            Action::SendDecode(transfer),
        )
    }
}

#[cfg(test)]
mod tests;
