//! The messages between two sidecars about KV that waits in a prefill engine for a decode side.
//!
//! The decode side's sidecar connects to the fetch port of the prefill side's sidecar. A random
//! token names the KV. The decode side got the token with the request. Each message may be
//! repeated. If a [`ToKeeper::Fetch`] succeeds, the prefill side asks for slots with an
//! `AllocRequest`, and the rest of the hand-over is as usual.

use serde::{Deserialize, Serialize};

use crate::local::Target;
use crate::{Epoch, Reason, RequestId, Token};

/// Messages from a decode side's sidecar to the fetch port of a prefill side's sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToKeeper {
    /// Asks the prefill side to push the KV to this receiver. The decode request is parked.
    Fetch(Fetch),
    /// Keeps the KV for longer, while the decode request waits in its engine's queue.
    Renew(OfToken),
    /// Says that this decode request does not need the KV.
    Drop(OfToken),
}

/// Messages from a prefill side's sidecar to a decode side's sidecar, on the same connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToFetcher {
    /// Says that the decode side cannot get the KV of the token. If [`Gone::retry_ms`] is not 0, a
    /// repetition of the decode side's message may succeed.
    Gone(Gone),
}

/// Fields of `Fetch`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fetch {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Token of the KV.
    pub token: Token,
    /// Epoch of the prefill side's sidecar, which the decode side got together with the token; 0 if
    /// the decode side does not know the epoch.
    pub epoch: Epoch,
    /// Id of the decode request. The sender's `AllocRequest` then has this id.
    pub req: RequestId,
    /// Receiver that wants the KV.
    pub to: Target,
}

/// Fields of `Renew` and `Drop`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfToken {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Token of the KV.
    pub token: Token,
    /// Epoch of the prefill side's sidecar, as in [`Fetch::epoch`].
    pub epoch: Epoch,
    /// Id of the decode request.
    pub req: RequestId,
}

/// Fields of `Gone`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gone {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Token of the message to which this message is the answer.
    pub token: Token,
    /// Id of the decode request in that message.
    pub req: RequestId,
    /// Reason why the decode side cannot get the KV.
    pub reason: Reason,
    /// Time after which a repetition of the decode side's message may succeed, milliseconds; 0 if
    /// the decode side must not repeat the message. Absent: 0.
    #[serde(default)]
    pub retry_ms: u32,
}
