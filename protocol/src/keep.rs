//! The messages between two sidecars about KV that waits in a prefill engine for a decode side.
//!
//! The decode side's sidecar connects to the fetch port of the prefill side's sidecar. A random
//! token names the KV; it came to the decode side with the request itself. Each message may be
//! repeated. A [`ToKeeper::Fetch`] needs no answer: the prefill side asks for slots with an
//! `AllocRequest`, and from there on the hand-over is the usual one.

use serde::{Deserialize, Serialize};

use crate::local::Target;
use crate::{Epoch, Reason, RequestId, Token};

/// Messages from a decode side's sidecar to the fetch port of a prefill side's sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToKeeper {
    /// Asks the prefill side to push the KV to this receiver. The decode request is parked.
    Fetch(Fetch),
    /// Keeps the KV for longer: the decode request waits in its engine's queue.
    Renew(OfToken),
    /// Says that this decode request does not need the KV.
    Drop(OfToken),
}

/// Messages from a prefill side's sidecar to a decode side's sidecar, on the same connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToFetcher {
    /// Says that the token gives no KV, now or ever.
    Gone(Gone),
}

/// Fields of `Fetch`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fetch {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Token of the KV.
    pub token: Token,
    /// Epoch of the prefill side's sidecar, as the decode side learnt it with the token; 0: any.
    pub epoch: Epoch,
    /// Id of the decode request. The following `AllocRequest` has this id.
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
    /// Token of the message that this answers.
    pub token: Token,
    /// Id of the decode request in that message.
    pub req: RequestId,
    /// Reason for which the token gives no KV.
    pub reason: Reason,
    /// Time after which a repetition may succeed, milliseconds. Absent: never.
    #[serde(default)]
    pub retry_ms: u32,
}
