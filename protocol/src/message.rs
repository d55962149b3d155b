//! The messages between two sidecars, and between a sidecar and LMCache's PD backends.
//!
//! LMCache's structs come first, with LMCache's field order (msgspec writes maps in class order).
//! Our fields are in the optional map `x`, which LMCache ignores. Our own messages go only to peers
//! that have sent an `x`.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::{Epoch, Layout, LeaseId, Reason, RequestId};

/// Messages on the init port (REQ → ROUTER): two round trips for each link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum Init {
    /// First request: introduces the sender.
    NixlInitRequest(NixlInitRequest),
    /// Answer to the first request: introduces the receiver, or gives the reason why no link can be
    /// made.
    NixlInitResponse(NixlInitResponse),
    /// Second request: asks for the landing slots.
    NixlMemRegRequest(NixlMemRegRequest),
    /// Answer to the second request: gives the landing slots.
    NixlMemRegResponse(NixlMemRegResponse),
}

/// Fields of `NixlInitRequest`, the first request of the init handshake.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NixlInitRequest {
    /// NIXL agent metadata of the sender; empty without NIXL.
    pub local_meta_bytes: ByteBuf,
    /// Our extension. Absent: the message's sender is LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<Hello>,
}

/// Fields of `NixlInitResponse`, the answer to [`NixlInitRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NixlInitResponse {
    /// NIXL agent name of the *sender*, which the receiver's NIXL read from the sender's metadata;
    /// empty without NIXL.
    pub remote_agent_name: ByteBuf,
    /// NIXL agent metadata of the receiver; empty without NIXL.
    pub remote_meta_bytes: ByteBuf,
    /// Our extension; present if the request had an `x`. Absent: the receiver is LMCache, or
    /// answers LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<Hello>,
}

/// Fields of `NixlMemRegRequest`, the second request of the init handshake.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NixlMemRegRequest {
    /// Copy of [`NixlInitResponse::remote_agent_name`].
    pub remote_agent_name: ByteBuf,
    /// Name of the sender; empty from LMCache's sync sender.
    pub local_id: String,
    /// Memory of the sender as a pickled descriptor list. Our list is empty, because no peer needs
    /// access to our sender's memory.
    pub local_xfer_dlist_bytes: ByteBuf,
    /// Our extension. Absent: the message's sender is LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<Version>,
}

/// Fields of `NixlMemRegResponse`, the answer to [`NixlMemRegRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NixlMemRegResponse {
    /// Landing slots as a pickled descriptor list with one row per slot; an empty list without
    /// NIXL.
    pub remote_xfer_dlist_bytes: ByteBuf,
    /// Our extension; present if the request had an `x`. Absent: the receiver is LMCache, or
    /// answers LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<Pages>,
}

/// The `x` of a message that needs only the version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Protocol version of the message's sender.
    pub v: u32,
}

/// The `x` of `NixlInitRequest` and `NixlInitResponse`: identity, layout and transports of one
/// side.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Name of the sidecar; `name/rank` if the sidecar has several ranks. A configured name stays
    /// the same over restarts.
    pub id: String,
    /// Epoch of the sidecar.
    pub epoch: Epoch,
    /// Shape of a chunk. Absent: no engine has connected yet.
    pub layout: Option<Layout>,
    /// Transports that this side can use, best first.
    pub transports: Vec<Advert>,
    /// Identity of the host: boot id and PID namespace. If two sidecars have the same identity,
    /// each sidecar can watch the process of the other sidecar.
    pub host: String,
    /// Process id in that PID namespace.
    pub pid: u32,
    /// From a sender: SHA-256 of a secret of the sender's process, 32 bytes. Absent: no successor
    /// can prove that this process has ended.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub seal: ByteBuf,
    /// From a sender: secrets of earlier processes that this sender replaces, 32 bytes each, at
    /// most 16. All these processes have ended. Absent: as if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended: Vec<ByteBuf>,
    /// Reason why no link can be made; the other fields are valid nevertheless. Absent: the link
    /// can be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
}

fn is_empty(bytes: &ByteBuf) -> bool {
    bytes.is_empty()
}

/// Reason why the init handshake ended without a link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// Reason, for counters and decisions.
    pub reason: Reason,
    /// Text for operators: the field that differs, both values, and what to change.
    pub text: String,
}

/// One transport of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advert {
    /// Name of the transport: `cuda_ipc`, `nixl` or `tcp`.
    pub kind: String,
    /// Address: `host:port` for `tcp`; empty for `nixl`, because the agent metadata contains the
    /// address. For `cuda_ipc` it is `UUID/bytes/handle`: the receiver's GPU, the size of its
    /// buffer in bytes and the buffer's IPC handle in hexadecimal. Only a sender with the same
    /// [`Hello::host`] can use this address. Absent: as if empty.
    #[serde(default)]
    pub address: String,
}

/// The `x` of [`NixlMemRegResponse`]: describes the landing buffer for all transports, even those
/// that need no descriptor list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Number of slots in the landing buffer.
    pub slots: u32,
    /// Size of a slot in bytes.
    pub slot_bytes: u64,
}

/// Messages from a sender to a receiver, on the alloc port (DEALER or REQ → ROUTER).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToReceiver {
    /// Asks for slots.
    AllocRequest(AllocRequest),
    /// Ends a lease or a request: the sender posts no further write of this request. The receiver
    /// answers with an empty [`ToSender::AllocResponse`].
    CancelNotif(CancelNotif),
    /// Announces writes into these slots, or repeats the announcement while the writes are in
    /// flight. The receiver then polls NIXL, because NIXL can complete some writes only if the
    /// receiver polls. The sender sends no `Writing` for other writes. Like every message under a
    /// lease, the message also extends the lease.
    Writing(Slots),
    /// Reports all chunks that the transport has flushed and that the receiver has not acknowledged
    /// yet. The receiver answers with [`ToSender::Ack`].
    Written(Written),
    /// Keeps a lease alive. The receiver then repeats messages that were lost: [`ToSender::More`]
    /// for open chunks that are not in `granted`, or [`ToSender::Unwanted`] if the lease has ended.
    Extend(Extend),
}

/// Messages from a receiver to a sender, on the alloc port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToSender {
    /// Answers [`ToReceiver::AllocRequest`] and [`ToReceiver::CancelNotif`].
    AllocResponse(AllocResponse),
    /// Grants further slots under a lease.
    More(More),
    /// Acknowledges that the receiver has recorded these chunks as written.
    Ack(Ack),
    /// Says that the receiver wants no more writes under this lease. The sender answers with
    /// [`ToReceiver::CancelNotif`] as soon as no write is in flight. If the sender does not know
    /// the lease, it answers at once.
    Unwanted(Unwanted),
}

/// Messages on the query port (REQ → ROUTER), which only LMCache's bidirectional mode uses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum Query {
    /// Asks for the keys whose KV the receiver could send back.
    CacheQueryRequest(CacheQueryRequest),
    /// The answer: no KV can be sent back, because a slot keeps KV only until the engine has read
    /// the KV.
    CacheQueryResponse(CacheQueryResponse),
}

/// Fields of `CacheQueryRequest`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheQueryRequest {
    /// Keys of chunks.
    pub keys: Vec<String>,
}

/// Fields of `CacheQueryResponse`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheQueryResponse {
    /// Keys that the receiver has; always empty in our answers.
    pub cached_keys: Vec<String>,
    /// Slot of each of these keys; always empty in our answers.
    pub cached_indexes: Vec<SlotOf>,
}

/// Fields of `AllocRequest`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocRequest {
    /// Key of each chunk, in order; the last chunk may be partial.
    pub keys: Vec<String>,
    /// LMCache's `MemoryFormat`: 1 = `KV_2LTD`, 6 = `KV_MLA_FMT`.
    pub fmt: u32,
    /// Shape of the first chunk.
    pub shape: Vec<u64>,
    /// Element type, as in [`Layout::dtype`].
    pub dtype: String,
    /// Number of tokens in the last chunk.
    pub last_chunk_toks: u32,
    /// Id of the request, at most 256 characters; empty means unknown. Absent: as if empty
    /// (LMCache's sync sender).
    #[serde(default)]
    pub req_id: String,
    /// True if no further batch of this request follows; always true in a request with `x`. Absent:
    /// false.
    #[serde(default)]
    pub is_last_batch: bool,
    /// Number of chunks in the whole request. Absent: 0, which means unknown.
    #[serde(default)]
    pub total_chunks: u32,
    /// Our extension. Absent: the message's sender is LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<AllocX>,
}

/// The `x` of [`AllocRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocX {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Number of this message, chosen by the sender. A repetition has the same number. The answer
    /// contains the number.
    pub seq: u64,
    /// Name of the sender.
    pub id: String,
    /// Epoch of the sender.
    pub epoch: Epoch,
    /// Epoch of the receiver, from the init handshake.
    pub to_epoch: Epoch,
    /// Number of tokens that the keys cover.
    pub tokens: u32,
    /// Duration of the lease, milliseconds: the lease ends if the sender sends no message for this
    /// time.
    pub lease_ms: u32,
    /// Maximum time for which the receiver may delay the answer because slots are missing,
    /// milliseconds.
    pub wait_ms: u32,
    /// Maximum time for which the receiver may delay the answer because the decode request has not
    /// parked, milliseconds; 0 if the decode request will not park before the KV has arrived.
    pub park_ms: u32,
    /// Name of the transport that the sender will use. The proof that a slot is free of writes
    /// depends on the transport.
    pub transport: String,
}

/// Fields of `AllocResponse`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocResponse {
    /// One slot for each key that is not in `already_sent_indexes`; −1 if the key gets no slot, or
    /// gets its slot later.
    pub remote_indexes: Vec<i64>,
    /// Positions in [`AllocRequest::keys`] that need no transfer.
    pub already_sent_indexes: Vec<u32>,
    /// Our extension. Absent: the receiver is LMCache, or answers LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<AllocResponseX>,
}

/// The `x` of [`AllocResponse`]. A grant has a lease, a refusal has a reason, the answer to a
/// `CancelNotif` has neither.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocResponseX {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Number of the message that is answered ([`AllocX::seq`] or [`CancelX::seq`]).
    pub seq: u64,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Id of the granted lease. Absent: nothing was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseId>,
    /// Number of leading tokens of the request that the decode side already has. Absent: 0.
    #[serde(default)]
    pub have_tokens: u32,
    /// Number of slots that will follow in [`ToSender::More`] when other requests release their
    /// slots. Absent: 0.
    #[serde(default)]
    pub window: u32,
    /// Reason for the refusal. Absent: the answer is not a refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Time after which a retry may succeed, milliseconds; 0 if not known. Absent: 0.
    #[serde(default)]
    pub retry_ms: u32,
}

/// Fields of `CancelNotif`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CancelNotif {
    /// Id of the request; empty if the sender does not know it.
    pub req_id: String,
    /// Keys of the chunks that the sender will not write.
    pub keys: Vec<String>,
    /// Our extension. Absent: the message's sender is LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<CancelX>,
}

/// The `x` of [`CancelNotif`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CancelX {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Number of this message, chosen by the sender. The answer contains the number.
    pub seq: u64,
    /// The lease that ends.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Reason why the sender ends the lease.
    pub reason: Reason,
    /// Slots into which a write may still be in flight. The receiver quarantines them. The sender
    /// guarantees that no write into any other slot of the lease is in flight or will follow.
    pub dirty: Vec<SlotOf>,
}

/// Index of a slot as a plain number, for lists in messages.
pub type SlotOf = u32;

/// Fields of `Writing`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slots {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Slots that are being written.
    pub indexes: Vec<SlotOf>,
}

/// Fields of `Written`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Positions of the chunks in the request's keys.
    pub chunks: Vec<u32>,
    /// Slot of each of these chunks.
    pub indexes: Vec<SlotOf>,
    /// XXH3-64 checksum of each of these chunks; empty if the sender computes none. Absent: as if
    /// empty.
    #[serde(default)]
    pub sums: Vec<u64>,
}

/// Fields of `Extend`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Extend {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Chunks for which the sender has a slot.
    pub granted: Vec<u32>,
}

/// Fields of `More`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct More {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Positions of the chunks in the request's keys.
    pub chunks: Vec<u32>,
    /// Slot of each of these chunks.
    pub indexes: Vec<SlotOf>,
}

/// Fields of `Ack`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ack {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Acknowledged chunks of one `Written` message.
    pub chunks: Vec<u32>,
}

/// Fields of `Unwanted`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unwanted {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Reason why the receiver wants no more writes. With the reason `quarantined`, the receiver
    /// asks about an old lease whose slots are still quarantined.
    pub reason: Reason,
}

impl AllocRequest {
    /// Returns the request id; `None` for a message of LMCache's sync sender.
    pub fn request(&self) -> Option<RequestId> {
        (!self.req_id.is_empty()).then(|| RequestId(self.req_id.clone()))
    }
}
