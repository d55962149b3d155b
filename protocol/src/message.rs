//! The messages between two sidecars, and between a sidecar and LMCache's PD backends.
//!
//! LMCache's structs come first, with LMCache's field order (msgspec writes maps in class order).
//! What is ours travels in the optional map `x`, which LMCache ignores, or in messages that are
//! only ever sent to a peer that has shown an `x`.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::{Epoch, Layout, LeaseId, Reason, RequestId};

/// Everything on the init port (REQ → ROUTER, two lockstep round trips per sender process).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum Init {
    /// Introduces the sender.
    NixlInitRequest(NixlInitRequest),
    /// Introduces the receiver.
    NixlInitResponse(NixlInitResponse),
    /// Asks for the receiver's pages.
    NixlMemRegRequest(NixlMemRegRequest),
    /// The receiver's pages.
    NixlMemRegResponse(NixlMemRegResponse),
}

/// First message of the init handshake.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NixlInitRequest {
    /// The sender's NIXL agent metadata; empty without NIXL.
    pub local_meta_bytes: ByteBuf,
    /// Absent from LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<Hello>,
}

/// Answer to [`NixlInitRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NixlInitResponse {
    /// The *requester's* agent name, as the receiver's NIXL loaded it.
    pub remote_agent_name: ByteBuf,
    /// The receiver's NIXL agent metadata; empty without NIXL.
    pub remote_meta_bytes: ByteBuf,
    /// Absent from LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<Hello>,
}

/// Second request of the init handshake.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NixlMemRegRequest {
    /// Echo of [`NixlInitResponse::remote_agent_name`].
    pub remote_agent_name: ByteBuf,
    /// The sender's own name; `""` from LMCache's sync sender.
    pub local_id: String,
    /// The sender's pages as a pickled descriptor list; ours exports none.
    pub local_xfer_dlist_bytes: ByteBuf,
    /// Absent from LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<Version>,
}

/// Answer to [`NixlMemRegRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NixlMemRegResponse {
    /// The receiver's pages as a pickled descriptor list, one row a slot.
    pub remote_xfer_dlist_bytes: ByteBuf,
    /// Absent from LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<Pages>,
}

/// `x` of a message that needs no more than the version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Protocol version of the message's sender.
    pub v: u32,
}

/// `x` of both init messages: identity, layout and transports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// The sidecar's configured or generated name, stable over restarts if configured.
    pub id: String,
    /// The sidecar's epoch.
    pub epoch: Epoch,
    /// The shape of a chunk; absent while no engine has said hello.
    pub layout: Option<Layout>,
    /// Wires that this side can use, best first.
    pub transports: Vec<Advert>,
    /// Identity of the host (boot id and PID namespace), so that a same-host peer can be fenced by
    /// its process.
    pub host: String,
    /// Process id within that PID namespace.
    pub pid: u32,
    /// SHA-256 of a secret of the sender's process; a successor shows the secret when that process has ended.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub seal: ByteBuf,
    /// Secrets of the processes that this sender replaces; all of them have ended.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ended: Vec<ByteBuf>,
    /// Set on a refusal: why no link can be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
}

fn is_empty(bytes: &ByteBuf) -> bool {
    bytes.is_empty()
}

/// Why the init handshake ended without a link.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refusal {
    /// For counters and decisions.
    pub reason: Reason,
    /// For people: the field that differs, both values, what to do.
    pub text: String,
}

/// One wire of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advert {
    /// `nixl` or `tcp`.
    pub kind: String,
    /// `host:port` for `tcp`; empty for `nixl`, whose address is the agent metadata.
    #[serde(default)]
    pub address: String,
}

/// `x` of [`NixlMemRegResponse`]: the landing buffer, for wires that need no descriptor list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Slots of the landing buffer.
    pub slots: u32,
    /// Bytes of a slot.
    pub slot_bytes: u64,
}

/// Sender → receiver on the alloc port (DEALER or REQ → ROUTER).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToReceiver {
    /// Asks for slots.
    AllocRequest(AllocRequest),
    /// The sender's last word on a lease or request; answered by an empty [`AllocResponse`].
    CancelNotif(CancelNotif),
    /// Writes into these slots are about to be posted.
    Writing(Slots),
    /// The transport reported these slots flushed.
    Written(Written),
    /// Keeps a lease alive and repairs what was lost on the way.
    Extend(Extend),
}

/// Receiver → sender on the alloc port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum ToSender {
    /// Answer to [`AllocRequest`] and [`CancelNotif`].
    AllocResponse(AllocResponse),
    /// Further slots of a windowed lease.
    More(More),
    /// These chunks of the lease have been noted as written.
    Ack(Ack),
    /// Nothing more is wanted under this lease; answered by [`CancelNotif`] once no write is under way.
    Unwanted(Unwanted),
}

/// The query port (REQ → ROUTER): LMCache's bidirectional mode only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum Query {
    /// Which of these keys can be read back?
    CacheQueryRequest(CacheQueryRequest),
    /// None: slots are transit.
    CacheQueryResponse(CacheQueryResponse),
}

/// See [`Query::CacheQueryRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheQueryRequest {
    /// Keys.
    pub keys: Vec<String>,
}

/// Answer to [`CacheQueryRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CacheQueryResponse {
    /// Those of the keys that are there.
    pub cached_keys: Vec<String>,
    /// The slot of each.
    pub cached_indexes: Vec<SlotOf>,
}

/// Asks for a slot for each key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocRequest {
    /// `model@world_size@rank@hash@dtype`, one a chunk, in order.
    pub keys: Vec<String>,
    /// LMCache's MemoryFormat: 1 = `KV_2LTD`, 6 = `KV_MLA_FMT`.
    pub fmt: u32,
    /// Shape of the first chunk.
    pub shape: Vec<u64>,
    /// LMCache's dtype name.
    pub dtype: String,
    /// Tokens in the last chunk.
    pub last_chunk_toks: u32,
    /// Absent from LMCache's sync sender; `""` means none.
    #[serde(default)]
    pub req_id: String,
    /// LMCache's async accounting: no further batch of this request follows.
    #[serde(default)]
    pub is_last_batch: bool,
    /// LMCache's async accounting: chunks of the whole request.
    #[serde(default)]
    pub total_chunks: u32,
    /// Absent from LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<AllocX>,
}

/// `x` of [`AllocRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocX {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Number of this request at this sender; the response carries it back. A repeat has the same.
    pub seq: u64,
    /// The sending sidecar's name.
    pub id: String,
    /// The sending sidecar's epoch.
    pub epoch: Epoch,
    /// The receiver's epoch as the init handshake gave it.
    pub to_epoch: Epoch,
    /// Tokens of the request that the keys cover.
    pub tokens: u32,
    /// The sender speaks up at least this often while the lease lives, milliseconds.
    pub lease_ms: u32,
    /// Longest time that the receiver may hold the answer until it has room, milliseconds.
    pub wait_ms: u32,
    /// The decode leg is on its way: how long the receiver may hold the answer for it to park,
    /// milliseconds. 0: nobody will park before the data has come.
    pub park_ms: u32,
    /// The wire that the sender will write with: what proves a slot free of writes depends on it.
    pub transport: String,
}

/// Answer to [`AllocRequest`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocResponse {
    /// A slot for each key that is not in `already_sent_indexes`; −1: none (now).
    pub remote_indexes: Vec<i64>,
    /// Positions in `keys` that need no transfer.
    pub already_sent_indexes: Vec<u32>,
    /// Absent from LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<AllocResponseX>,
}

/// `x` of [`AllocResponse`]. Either a lease or a reason is set; neither on the answer to a cancel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocResponseX {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// [`AllocX::seq`] of the request that is answered.
    pub seq: u64,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// The permission to write; absent on a refusal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseId>,
    /// Tokens that the decode side holds already. The chunk that contains the mark begins there.
    #[serde(default)]
    pub have_tokens: u32,
    /// Slots that will follow in [`More`] as others are released.
    #[serde(default)]
    pub window: u32,
    /// Why nothing was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// When a retry may succeed, milliseconds.
    #[serde(default)]
    pub retry_ms: u32,
}

/// See [`ToReceiver::CancelNotif`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CancelNotif {
    /// The request.
    pub req_id: String,
    /// LMCache: the keys whose slots are given up.
    pub keys: Vec<String>,
    /// Absent from LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<CancelX>,
}

/// `x` of [`CancelNotif`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CancelX {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Number of this message at this sender.
    pub seq: u64,
    /// The lease that ends.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Why the sender ends it.
    pub reason: Reason,
    /// Slots of writes that failed to post or whose end nobody knows: to be quarantined. Every
    /// other slot of the lease is, by this word, free of writes.
    pub dirty: Vec<SlotOf>,
}

/// A slot as it stands in lists.
pub type SlotOf = u32;

/// See [`ToReceiver::Writing`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slots {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Slots.
    pub indexes: Vec<SlotOf>,
}

/// See [`ToReceiver::Written`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Chunks of the request, by position in its keys.
    pub chunks: Vec<u32>,
    /// The slot of each chunk.
    pub indexes: Vec<SlotOf>,
    /// XXH3-64 of each chunk's bytes; empty if the sender does not compute them.
    #[serde(default)]
    pub sums: Vec<u64>,
}

/// See [`ToReceiver::Extend`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Extend {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Chunks for which the sender knows a slot. The receiver repeats [`More`] for the others.
    pub granted: Vec<u32>,
}

/// See [`ToSender::More`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct More {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Chunks of the request.
    pub chunks: Vec<u32>,
    /// The slot of each chunk.
    pub indexes: Vec<SlotOf>,
}

/// See [`ToSender::Ack`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ack {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Chunks noted as written, in this and earlier messages.
    pub chunks: Vec<u32>,
}

/// See [`ToSender::Unwanted`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Unwanted {
    /// The lease.
    pub lease: LeaseId,
    /// The receiver's epoch.
    pub epoch: Epoch,
    /// Why.
    pub reason: Reason,
}

impl AllocRequest {
    /// The request id, or `None` for a message of LMCache's sync sender.
    pub fn request(&self) -> Option<RequestId> {
        (!self.req_id.is_empty()).then(|| RequestId(self.req_id.clone()))
    }
}
