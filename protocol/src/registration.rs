//! Messages that sidecars PUSH to the proxy's registration port. One way: the acknowledgement is the proxy's
//! HTTP call-back to the sidecar's admin port.

use serde::{Deserialize, Serialize};

use crate::{Epoch, Layout, Reason, RequestId};

/// Everything on the registration port.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
#[expect(
    clippy::large_enum_variant,
    reason = "a queue of them holds the small ones, and `Register` is sent as soon as it is made"
)]
pub enum ToProxy {
    /// I am here, with this load. Repeated every `period_ms`: it is its own heartbeat.
    Register(Register),
    /// I am going away on purpose.
    Leave(Leave),
    /// The prefill engine has begun to compute this request.
    Progress(Progress),
    /// The KV of this request has been written, or will not be. LMCache's message.
    ProxyNotif(ProxyNotif),
}

/// Which legs an instance takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceRole {
    /// Prefill legs.
    Prefill,
    /// Decode legs.
    Decode,
    /// Either.
    Both,
}

/// See [`ToProxy::Register`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Register {
    /// Protocol version.
    pub v: u32,
    /// The sidecar's name.
    pub id: String,
    /// The sidecar's epoch.
    pub epoch: Epoch,
    /// Which legs its engine takes.
    pub role: InstanceRole,
    /// Base URL of the engine's OpenAI server, e.g. `http://127.0.0.1:8100`.
    pub http: String,
    /// Base URL of the sidecar's admin server.
    pub admin: String,
    /// Host that senders reach the init and alloc ports at; empty for a sender.
    pub host: String,
    /// Init port of each rank.
    pub init_ports: Vec<u16>,
    /// Alloc port of each rank.
    pub alloc_ports: Vec<u16>,
    /// Its engine may be given requests. A push would work, unless [`Register::unmoved`] says why not.
    pub ready: bool,
    /// Slots of the landing or send buffer, all ranks.
    pub slots: u32,
    /// Free ones among these slots.
    pub free_slots: u32,
    /// Tokens of decode requests that are parked.
    pub parked_tokens: u64,
    /// This message comes again within so many milliseconds; three missed mean gone.
    pub period_ms: u32,
    /// Ranks that KV is cut into; 0 from a sidecar that does not say it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ranks: u32,
    /// The shape of a chunk; absent while no engine has said it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// Its engine moves no KV, for this reason: no pair is made with it. Empty: it moves KV.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unmoved: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// See [`ToProxy::Leave`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Leave {
    /// The sidecar's name.
    pub id: String,
    /// The sidecar's epoch.
    pub epoch: Epoch,
}

/// See [`ToProxy::Progress`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The sidecar's name.
    pub id: String,
    /// The request.
    pub req_id: RequestId,
}

/// See [`ToProxy::ProxyNotif`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProxyNotif {
    /// The request.
    pub req_id: RequestId,
    /// Absent from LMCache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<NotifX>,
}

/// `x` of [`ProxyNotif`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NotifX {
    /// Protocol version.
    pub v: u32,
    /// Every chunk that the decode side wanted is written.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Bytes written.
    pub bytes: u64,
    /// From the reservation to the last write, microseconds.
    pub us: u64,
    /// The wire that was used.
    pub transport: String,
}

/// The ZeroMQ identity of a proxy's registration port, by which a sidecar knows it from LMCache's proxy.
pub const PROXY_NAME: &str = "pd-proxy";
