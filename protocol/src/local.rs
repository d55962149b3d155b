//! The messages between an engine and its sidecar over the unix socket.
//!
//! A frame is a little-endian `u32` length and one msgpack map whose key `type` names the message.
//! The first frame from the engine is [`ToSidecar::Hello`]; the sidecar answers [`ToEngine::Welcome`]
//! with the buffer's file descriptor attached (`SCM_RIGHTS`) or, of a buffer in GPU memory, its CUDA
//! IPC handle in it, or [`ToEngine::Refused`] and closes.
//! End of stream means that the engine is gone: everything it held ends at once.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::{Epoch, Layout, Reason, RequestId};

/// Engine → sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToSidecar {
    /// Opens the connection.
    Hello(EngineHello),
    /// Prefill: computing has begun; asks for room for these chunks at `to`.
    Reserve(Reserve),
    /// Prefill: tokens `[0, upto)` will have been computed at the end of this step, so their chunks
    /// may take send slots now.
    Computing(Computing),
    /// Prefill: these chunks stand in their granted slots, complete, or will once an event has fired.
    Staged(Staged),
    /// Prefill: the request ends here. No slot of it is touched after this message.
    Cancel(OfRequest),
    /// Decode: the request is parked, with its KV blocks allocated, and waits for these chunks.
    Await(Await),
    /// Decode: these chunks have been read.
    Release(Release),
    /// Decode: the request is not wanted any more. No slot of it is read after this message.
    Abort(OfRequest),
}

/// Sidecar → engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToEngine {
    /// The connection stands; the buffer's descriptor comes with this frame, or its handle in it.
    Welcome(Welcome),
    /// The connection is refused and closed.
    Refused(Refused),
    /// Prefill: gather these chunks into these slots, then say [`ToSidecar::Staged`].
    Granted(Granted),
    /// Decode: these chunks may be read.
    Ready(Ready),
    /// The request's end on this connection; nothing follows for it.
    Ended(Ended),
}

/// See [`ToSidecar::Hello`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineHello {
    /// Version of this protocol.
    pub v: u32,
    /// For logs: the engine's name.
    pub engine: String,
    /// Which side of a transfer this connection uses.
    pub role: EngineRole,
    /// Rank of the KV that this connection is for, which chooses the buffer: of a tensor-parallel
    /// worker its own, or one of several.
    pub rank: u32,
    /// Ranks that KV is cut into; the sidecar has as many.
    pub world_size: u32,
    /// The shape of a chunk, from the engine's KV tensors. With [`EngineHello::unmoved`] it says no
    /// more than the model's name.
    pub layout: Layout,
    /// UUID of the engine's GPU, `GPU-xxxxxxxx-…`: ordinals differ between processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// CUDA IPC handles of events on that GPU, which [`Staged::event`] names by position.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub events: Vec<ByteBuf>,
    /// This engine moves no KV, for this reason: it computes every prompt itself, and asks for nothing.
    /// Empty: it moves KV.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unmoved: String,
}

/// Which side of a transfer an engine connection uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineRole {
    /// Reserves and stages.
    Prefill,
    /// Awaits and releases.
    Decode,
}

/// See [`ToEngine::Welcome`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// Version of this protocol.
    pub v: u32,
    /// The sidecar's name.
    pub id: String,
    /// The sidecar's epoch; another one after a reconnect means another buffer.
    pub epoch: Epoch,
    /// `memfd`: the descriptor is to be mapped shared, read-write. `cuda`: see [`Welcome::cuda`]. `none`:
    /// no buffer, for an engine that moves no KV.
    pub memory: String,
    /// Slots; slot `i` begins at `i * slot_bytes`.
    pub slots: u32,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// This connection's number, for logs.
    pub connection: u64,
    /// Present if the buffer is GPU memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cuda: Option<CudaMemory>,
}

/// A buffer in GPU memory, as another process opens it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CudaMemory {
    /// The GPU's UUID, `GPU-xxxxxxxx-…`.
    pub uuid: String,
    /// Its `CUipcMemHandle`.
    pub handle: ByteBuf,
    /// Bytes of the whole buffer.
    pub bytes: u64,
}

/// See [`ToEngine::Refused`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refused {
    /// For counters and decisions.
    pub reason: Reason,
    /// For people.
    pub text: String,
}

/// The alloc and init address of one receiver rank.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Target {
    /// Host name or address.
    pub host: String,
    /// Port of the init handshake.
    pub init_port: u16,
    /// Port of the alloc requests.
    pub alloc_port: u16,
}

/// See [`ToSidecar::Reserve`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reserve {
    /// The request.
    pub req: RequestId,
    /// The receiver that wants its KV.
    pub to: Target,
    /// One key a chunk, in order, the partial last one too.
    pub keys: Vec<String>,
    /// Tokens of the request that the keys cover.
    pub tokens: u32,
    /// As [`Computing::upto`].
    pub upto: u32,
    /// The decode leg is sent as soon as this request has begun, so the receiver may wait for it.
    #[serde(default)]
    pub overlap: bool,
}

/// See [`ToSidecar::Computing`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Computing {
    /// The request.
    pub req: RequestId,
    /// Tokens from the start that this step completes.
    pub upto: u32,
}

/// See [`ToSidecar::Staged`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Staged {
    /// The request.
    pub req: RequestId,
    /// Chunks.
    pub chunks: Vec<u32>,
    /// Duration of the gather, microseconds.
    #[serde(default)]
    pub gather_us: u64,
    /// Position in [`EngineHello::events`]: the chunks are complete once that event, as recorded
    /// before this message was sent, has fired. Absent: they are complete already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<u32>,
    /// The same by ranges of layers, in order: each ends before its `below` and stands once its own
    /// event has fired. The last one ends with the last layer and names [`Staged::event`]. Empty: there
    /// is one range.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayersStaged>,
}

/// See [`Staged::layers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayersStaged {
    /// The range ends before this layer.
    pub below: u32,
    /// As [`Staged::event`], of this range.
    pub event: u32,
}

/// A message that needs no more than the request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OfRequest {
    /// The request.
    pub req: RequestId,
}

/// See [`ToSidecar::Await`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Await {
    /// The request.
    pub req: RequestId,
    /// One key a chunk, in order, as [`Reserve::keys`].
    pub keys: Vec<String>,
    /// Tokens of the request that the keys cover.
    pub tokens: u32,
    /// Tokens at the start that the engine holds already.
    pub have_tokens: u32,
    /// After this time the sidecar answers [`ToEngine::Ended`], milliseconds.
    pub deadline_ms: u32,
    /// LMCache's sender has told the proxy that all of it is written.
    #[serde(default)]
    pub written: bool,
}

/// See [`ToSidecar::Release`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Release {
    /// The request.
    pub req: RequestId,
    /// Chunks.
    pub chunks: Vec<u32>,
    /// Duration of the scatter, microseconds.
    #[serde(default)]
    pub scatter_us: u64,
}

/// See [`ToEngine::Granted`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Granted {
    /// The request.
    pub req: RequestId,
    /// Tokens that the other side holds: chunks below are never granted, and the chunk that contains
    /// the mark is packed from the mark on.
    pub have_tokens: u32,
    /// Chunks. Empty in the message that only says `have_tokens`.
    pub chunks: Vec<u32>,
    /// The slot of each chunk.
    pub slots: Vec<u32>,
    /// They would arrive sooner if they were gathered layer by layer, see [`Staged::layers`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub layers: bool,
}

/// See [`ToEngine::Ready`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ready {
    /// The request.
    pub req: RequestId,
    /// The chunk that contains this token is packed from it on.
    pub first_token: u32,
    /// Chunks.
    pub chunks: Vec<u32>,
    /// The slot of each chunk.
    pub slots: Vec<u32>,
}

/// See [`ToEngine::Ended`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// The request.
    pub req: RequestId,
    /// Why it ended early; absent if every wanted chunk arrived (decode: and was released).
    pub reason: Option<Reason>,
    /// Bytes that moved.
    pub bytes: u64,
}
