//! The messages between an engine and its sidecar over the unix socket.
//!
//! A frame is a little-endian `u32` length and one msgpack map whose key `type` names the message.
//! The engine sends [`ToSidecar::Hello`] first. The sidecar answers with [`ToEngine::Welcome`] or
//! [`ToEngine::Refused`], and closes the connection after `Refused`. The buffer comes with
//! `Welcome`: as a file descriptor (`SCM_RIGHTS`), or as a CUDA IPC handle if it is GPU memory. The
//! end of the stream means that the engine has ended: all its requests end at once.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::{Epoch, Layout, Reason, RequestId, Token};

/// Messages from an engine to its sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToSidecar {
    /// Opens the connection.
    Hello(EngineHello),
    /// Prefill: the engine has begun to compute the request, so the sidecar must ask a receiver for
    /// slots.
    Reserve(Reserve),
    /// Prefill: the request names no receiver. The engine keeps the request's KV in its blocks
    /// until a decode side fetches the KV.
    Keep(Keep),
    /// Prefill: the engine's present step completes further tokens. The sender may now give send
    /// slots to the chunks of these tokens.
    Computing(Computing),
    /// Prefill: these chunks are complete in their granted slots, or will be complete when an event
    /// fires.
    Staged(Staged),
    /// Prefill: cancels the request. The engine accesses no slot of the request after this message.
    Cancel(OfRequest),
    /// Decode: the KV of a request waits at a prefill side. The sidecar renews the KV until the
    /// engine sends [`ToSidecar::Await`] for the request, and then fetches the KV.
    Expect(Expect),
    /// Decode: the request is parked, with its KV blocks allocated, and waits for these chunks.
    Await(Await),
    /// Decode: the engine has read these chunks.
    Release(Release),
    /// Decode: aborts the request. The engine reads no slot of the request after this message.
    Abort(OfRequest),
    /// Instead of [`ToSidecar::Hello`]: an operator wants to stop the prefill engine. The sidecar
    /// takes no new KV of prefill engines, and answers with [`ToEngine::Drained`].
    Drain(Drain),
}

/// Messages from a sidecar to an engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToEngine {
    /// Accepts the connection and gives the buffer.
    Welcome(Welcome),
    /// Refuses the connection; the sidecar then closes it.
    Refused(Refused),
    /// Prefill: the engine must gather these chunks into these slots and then send
    /// [`ToSidecar::Staged`].
    Granted(Granted),
    /// Decode: the engine may read these chunks.
    Ready(Ready),
    /// The request has ended on this connection; no further message about it follows.
    Ended(Ended),
    /// The answer to [`ToSidecar::Drain`]. The sidecar then closes the connection.
    Drained(Drained),
}

/// Fields of the engine's `Hello`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineHello {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Name of the engine, for logs.
    pub engine: String,
    /// The engine's side of the transfers on this connection: prefill or decode.
    pub role: EngineRole,
    /// Rank that this connection serves, from 0. Each rank has its own buffer.
    pub rank: u32,
    /// Number of ranks among which the KV is divided. The sidecar must have the same number.
    pub world_size: u32,
    /// Shape of a chunk, from the engine's KV tensors. If [`EngineHello::unmoved`] is present, the
    /// sidecar uses only the model's name.
    pub layout: Layout,
    /// UUID of the engine's GPU, `GPU-xxxxxxxx-…`. It is not the GPU's ordinal, because the ordinal
    /// differs between processes. Absent: the engine has no GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// CUDA IPC handles of events on that GPU, 64 bytes each, at most 1024; [`Staged::event`] is a
    /// position in this list. Absent: the engine uses no events.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<ByteBuf>,
    /// Reason why this engine moves no KV, at most 500 characters. The engine then computes every
    /// prompt itself and sends no requests. Absent: the engine moves KV.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unmoved: String,
}

/// The engine's side of the transfers on one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineRole {
    /// The engine sends `Reserve`, `Computing` and `Staged`.
    Prefill,
    /// The engine sends `Await` and `Release`.
    Decode,
}

/// Fields of `Welcome`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Name of the sidecar.
    pub id: String,
    /// Epoch of the sidecar. If the epoch differs after a reconnection, the sidecar has a new
    /// buffer.
    pub epoch: Epoch,
    /// Kind of the buffer: `memfd` (map the descriptor that comes with this message, shared and
    /// read-write), `cuda` (open the handle in [`Welcome::cuda`]) or `none` (no buffer, for an
    /// engine that moves no KV).
    pub memory: String,
    /// Number of slots; slot `i` begins at byte `i * slot_bytes`.
    pub slots: u32,
    /// Size of a slot in bytes.
    pub slot_bytes: u64,
    /// Number of this connection, for logs.
    pub connection: u64,
    /// Handle of the buffer. Absent: the buffer is not GPU memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda: Option<CudaMemory>,
    /// Address at which decode sides fetch the KV that this connection's engine keeps. Absent: the
    /// engine must not keep KV for decode sides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetch: Option<Keeper>,
}

/// Data with which another process opens a buffer in GPU memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaMemory {
    /// UUID of the GPU, `GPU-xxxxxxxx-…`.
    pub uuid: String,
    /// CUDA IPC handle of the buffer (`CUipcMemHandle`), 64 bytes.
    pub handle: ByteBuf,
    /// Size of the whole buffer in bytes.
    pub bytes: u64,
}

/// Fields of `Refused`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refused {
    /// Reason, for counters and decisions.
    pub reason: Reason,
    /// Text for operators: both values, and what to change.
    pub text: String,
}

/// Address of one rank of a receiver.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Target {
    /// Host name or address.
    pub host: String,
    /// Port of the init handshake.
    pub init_port: u16,
    /// Port of the alloc messages.
    pub alloc_port: u16,
}

/// Fields of `Reserve`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reserve {
    /// Id of the request.
    pub req: RequestId,
    /// Receiver that wants the KV.
    pub to: Target,
    /// Key of each chunk, in order; the last chunk may be partial.
    pub keys: Vec<String>,
    /// Number of tokens that the keys cover.
    pub tokens: u32,
    /// Number of leading tokens of the request that are computed when the engine's present step
    /// ends, as in [`Computing::upto`].
    pub upto: u32,
    /// True if the proxy sends the decode leg as soon as this request has begun. The receiver may
    /// then wait until the decode request parks. Absent: false.
    #[serde(default)]
    pub overlap: bool,
}

/// Address of the fetch port of one rank of a prefill side.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Keeper {
    /// Host name or address.
    pub host: String,
    /// Fetch port.
    pub port: u16,
}

/// Fields of `Keep`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Keep {
    /// Id of the request on this connection.
    pub req: RequestId,
    /// Token of the KV. The decode side gets the token with the answer to the prefill request.
    pub token: Token,
    /// Key of each chunk, in order, as in [`Reserve::keys`].
    pub keys: Vec<String>,
    /// Number of tokens that the keys cover.
    pub tokens: u32,
    /// Number of leading tokens of the request that are computed when the engine's present step
    /// ends, as in [`Computing::upto`].
    pub upto: u32,
    /// Time for which the KV is kept after it is computed, and after each `Renew`, milliseconds.
    pub keep_ms: u32,
}

/// Fields of `Expect`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Expect {
    /// Id of the request.
    pub req: RequestId,
    /// Token of the KV, from the request's parameters.
    pub token: Token,
    /// Fetch port of the prefill side's sidecar for the rank of this connection.
    pub from: Keeper,
    /// Epoch of the prefill side's sidecar; 0 if the engine does not know the epoch.
    pub epoch: Epoch,
    /// Time for which the prefill side keeps the KV, milliseconds, as in [`Keep::keep_ms`].
    pub keep_ms: u32,
}

/// Fields of `Computing`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Computing {
    /// Id of the request.
    pub req: RequestId,
    /// Number of leading tokens of the request that are computed when the engine's present step
    /// ends.
    pub upto: u32,
}

/// Fields of `Staged`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Staged {
    /// Id of the request.
    pub req: RequestId,
    /// Positions of the chunks in the request's keys.
    pub chunks: Vec<u32>,
    /// Duration of the gather, microseconds. Absent: 0.
    #[serde(default)]
    pub gather_us: u64,
    /// Position in [`EngineHello::events`]: the chunks are complete when that event fires. The
    /// engine recorded the event before it sent this message. Absent: the chunks are complete
    /// already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<u32>,
    /// The same chunks, divided into ranges of layers in ascending order. The last range ends with
    /// the last layer and names [`Staged::event`]. Absent: one range contains all layers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayersStaged>,
}

/// One range of layers of [`Staged::layers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayersStaged {
    /// First layer after the range. The range begins where the previous range ends.
    pub below: u32,
    /// Position in [`EngineHello::events`] of the event for this range, as in [`Staged::event`].
    pub event: u32,
}

/// Fields of `Cancel` and `Abort`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfRequest {
    /// Id of the request.
    pub req: RequestId,
}

/// Fields of `Await`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Await {
    /// Id of the request.
    pub req: RequestId,
    /// Key of each chunk, in order, as in [`Reserve::keys`].
    pub keys: Vec<String>,
    /// Number of tokens that the keys cover.
    pub tokens: u32,
    /// Number of leading tokens of the request that the engine already has; less than `tokens`.
    pub have_tokens: u32,
    /// Time after which the sidecar ends the request with [`ToEngine::Ended`], milliseconds.
    pub deadline_ms: u32,
    /// True if an LMCache sender has reported to the proxy that all KV is written. Absent: false.
    #[serde(default)]
    pub written: bool,
}

/// Fields of `Release`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// Id of the request.
    pub req: RequestId,
    /// Positions of the chunks in the request's keys.
    pub chunks: Vec<u32>,
    /// Duration of the scatter, microseconds. Absent: 0.
    #[serde(default)]
    pub scatter_us: u64,
}

/// Fields of `Granted`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Granted {
    /// Id of the request.
    pub req: RequestId,
    /// Number of leading tokens of the request that the decode side already has. The sender never
    /// grants a chunk that contains only these tokens. If a chunk begins with some of these tokens,
    /// only its other tokens are moved; they begin at the start of the slot.
    pub have_tokens: u32,
    /// Positions of the chunks in the request's keys; empty in the first message, which only gives
    /// `have_tokens`.
    pub chunks: Vec<u32>,
    /// Slot of each of these chunks in the send buffer.
    pub slots: Vec<u32>,
    /// True if a gather layer by layer ([`Staged::layers`]) would make the chunks arrive sooner.
    /// Absent: false.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub layers: bool,
}

/// Fields of `Ready`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// Id of the request.
    pub req: RequestId,
    /// First token that is moved. If a chunk begins before this token, only the chunk's tokens from
    /// this token on are moved; they begin at the start of the slot.
    pub first_token: u32,
    /// Positions of the chunks in the request's keys.
    pub chunks: Vec<u32>,
    /// Slot of each of these chunks in the landing buffer.
    pub slots: Vec<u32>,
}

/// Fields of `Ended`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// Id of the request.
    pub req: RequestId,
    /// Reason for the early end. Absent: every wanted chunk arrived, and at the decode side the
    /// engine has released every chunk.
    pub reason: Option<Reason>,
    /// Number of bytes moved.
    pub bytes: u64,
}

/// Fields of `Drain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// True: the sidecar answers when it keeps no KV any more. False: the sidecar answers at once.
    pub until_fetched: bool,
}

/// Fields of `Drained`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// Number of requests with KV that decode sides may still fetch, or that they are fetching.
    pub kept: u32,
}
