//! The life of a request: one enum, one function, no IO.
//!
//! ```text
//!               ┌────────────┐ begun, answered: send the decode leg  ┌──────────┐ first byte  ┌───────────┐
//!  with pair ──▶│ Prefilling │──────────────────────────────────────▶│ Decoding │────────────▶│ Streaming │
//!               └────────────┘ failed: send it without transfer      └──────────┘             └───────────┘
//!                     │ refused (4xx)                          alone ──▶│    ▲ │ failed              │ ended,
//!                     ▼                                                 │    └─┘ another instance    ▼ broke
//!                  Ended ◀──────────────────────────────────────────────┴──────────────────────── Ended
//! ```
//!
//! * `Prefilling`: the prefill leg is sent; its engine has not begun. Bounded by the prefill timeout.
//! * `Decoding`: the decode leg is sent; nothing of its answer has reached the client, so another
//!   instance can still take over. Bounded by the first-byte timeout, or that of whole answers.
//! * `Streaming`: bytes flow to the client. Bounded, between two pieces of data, by the idle timeout.
//! * `Ended`: with an outcome. The client can leave in every state.

use crate::openai::fallback::Fallback;
use crate::telemetry::outcome::Outcome;

/// Where a request is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestState {
    /// The prefill leg is on its way or queued at its engine.
    Prefilling,
    /// The decode leg is on its way or computing.
    Decoding {
        /// It waits for KV, or why it does not.
        transfer: Result<(), Fallback>,
        /// Decode legs sent so far.
        attempt: u32,
    },
    /// The answer flows to the client.
    Streaming,
    /// Over.
    Ended(Outcome),
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The prefill engine has begun to compute it.
    Begun,
    /// The prefill leg was answered with 2xx.
    PrefillAnswered,
    /// The prefill engine says that the request is wrong.
    PrefillRefused,
    /// The prefill leg failed.
    PrefillFailed(Fallback),
    /// The prefill leg failed before its engine had begun, and after the decode leg was sent.
    PrefillLost(Fallback),
    /// The first bytes of the decode leg's answer are there.
    FirstByte,
    /// The decode leg failed before that.
    DecodeFailed {
        /// Another instance can take it.
        another: bool,
    },
    /// The answer is complete.
    AnswerEnded,
    /// The answer is complete, and says that the request is wrong.
    AnswerRefused,
    /// The answer broke off.
    AnswerBroke,
    /// The client is gone.
    ClientLeft,
    /// The proxy stops and cannot wait for it.
    ForceShutdown,
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Wait on.
    Wait,
    /// Send the decode leg: with transfer parameters, or without, for this reason.
    SendDecode(Result<(), Fallback>),
    /// Answer the client with the prefill engine's refusal.
    PassRefusal,
    /// Answer the client with what the decode leg brings.
    Relay,
    /// Answer the client with an error.
    Fail,
    /// Nothing follows: drop both legs.
    Finish,
}

impl RequestState {
    /// A request at its start, and the first thing to do: `Wait` for the prefill leg, which is to be
    /// sent, or `SendDecode`.
    pub(crate) fn begin(plan: Result<(), Fallback>) -> (Self, Action) {
        match plan {
            Ok(()) => (Self::Prefilling, Action::Wait),
            Err(alone) => Self::decoding(Err(alone), 1),
        }
    }

    /// Takes an event.
    pub(crate) fn on(&mut self, event: Event) -> Action {
        let (next, action) = self.after(event);
        *self = next;
        action
    }

    /// The outcome, once it has ended.
    pub(crate) fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Ended(outcome) => Some(outcome),
            _ => None,
        }
    }

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

            // The decode leg waits for what nobody sends.
            (
                Self::Decoding {
                    transfer: Ok(()),
                    attempt,
                },
                E::PrefillLost(why),
            ) => Self::decoding(Err(why), attempt),
            (Self::Decoding { .. }, E::FirstByte) => (Self::Streaming, Action::Relay),
            (Self::Decoding { attempt, .. }, E::DecodeFailed { another: true }) => {
                Self::decoding(Err(Fallback::DecodeRetry), attempt + 1)
            }
            (Self::Decoding { .. }, E::DecodeFailed { another: false }) => {
                (Self::Ended(Outcome::Failed), Action::Fail)
            }

            (Self::Streaming, E::AnswerEnded) => (Self::Ended(Outcome::Done), Action::Finish),
            (Self::Streaming, E::AnswerRefused) => (Self::Ended(Outcome::Refused), Action::Finish),
            (Self::Streaming, E::AnswerBroke) => (Self::Ended(Outcome::Broken), Action::Finish),

            // Once the decode leg is sent, the end of the prefill leg is only noted: the decode
            // side hears of it from its own sidecar and computes what does not come.
            (
                Self::Decoding { .. } | Self::Streaming,
                E::Begun
                | E::PrefillAnswered
                | E::PrefillRefused
                | E::PrefillFailed(_)
                | E::PrefillLost(_),
            ) => (self, Action::Wait),

            // No decode leg is out in these states.
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

    fn decoding(transfer: Result<(), Fallback>, attempt: u32) -> (Self, Action) {
        (
            Self::Decoding { transfer, attempt },
            Action::SendDecode(transfer),
        )
    }
}

#[cfg(test)]
mod tests;
