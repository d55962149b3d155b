//! Messages that sidecars PUSH to the proxy's registration port. The proxy sends no messages back on this
//! port. The proxy acknowledges a registration by an HTTP call-back to the sidecar's admin port.

use serde::{Deserialize, Serialize};

use crate::{Epoch, Layout, Reason, RequestId};

/// Messages on the proxy's registration port (PUSH → PULL).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
#[expect(
    clippy::large_enum_variant,
    reason = "a queue of them holds the small ones, and `Register` is sent as soon as it is made"
)]
pub enum ToProxy {
    /// Announces an instance and its load. The sidecar repeats the message as a heartbeat.
    Register(Register),
    /// Says that the instance leaves on purpose.
    Leave(Leave),
    /// Says that the prefill engine has begun to compute this request and that the sender has asked
    /// the receiver for slots. The proxy may now send the decode leg.
    Progress(Progress),
    /// Says that the KV of this request is written, or will not be written. This is LMCache's
    /// message.
    ProxyNotif(ProxyNotif),
}

/// Kinds of legs that an instance serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InstanceRole {
    /// Prefill legs.
    Prefill,
    /// Decode legs.
    Decode,
    /// Both legs.
    Both,
}

/// Fields of `Register`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Register {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Name of the sidecar.
    pub id: String,
    /// Epoch of the sidecar.
    pub epoch: Epoch,
    /// Kinds of legs that the engine serves.
    pub role: InstanceRole,
    /// Base URL of the engine's OpenAI server, for example `http://127.0.0.1:8100`.
    pub http: String,
    /// Base URL of the sidecar's admin server.
    pub admin: String,
    /// Host at which senders reach the init and alloc ports; empty for a sender.
    pub host: String,
    /// Init port of each rank; empty for a sender.
    pub init_ports: Vec<u16>,
    /// Alloc port of each rank; empty for a sender.
    pub alloc_ports: Vec<u16>,
    /// True if the proxy may send requests to the engine. The sidecar then moves their KV, unless
    /// [`Register::unmoved`] is present.
    pub ready: bool,
    /// Number of slots in the landing or send buffers of all ranks.
    pub slots: u32,
    /// Number of these slots that are free.
    pub free_slots: u32,
    /// Number of tokens in parked decode requests.
    pub parked_tokens: u64,
    /// Time until the sidecar repeats this message, milliseconds. If three repetitions are missing,
    /// the proxy removes the instance.
    pub period_ms: u32,
    /// Number of ranks among which the KV is divided. Absent: not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub ranks: u32,
    /// Shape of a chunk. Absent: no engine has connected yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// Reason why the engine moves no KV. The proxy makes no pair with this instance. Absent: the
    /// engine moves KV.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub unmoved: String,
    /// Release of the sidecar, for example `0.1.0`. Instances of different releases can be a pair.
    /// Absent: not known.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub release: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// Fields of `Leave`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Leave {
    /// Name of the sidecar.
    pub id: String,
    /// Epoch of the sidecar.
    pub epoch: Epoch,
}

/// Fields of `Progress`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Name of the sidecar.
    pub id: String,
    /// Id of the request.
    pub req_id: RequestId,
}

/// Fields of `ProxyNotif`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProxyNotif {
    /// Id of the request.
    pub req_id: RequestId,
    /// Our extension. Absent: the sender is LMCache, and the KV is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x: Option<NotifX>,
}

/// The `x` of [`ProxyNotif`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NotifX {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// True if every chunk that the decode side wanted is written.
    pub ok: bool,
    /// Reason for the failure. Absent: there is no failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Number of bytes written.
    pub bytes: u64,
    /// Time from the reservation to the end of the last write, microseconds.
    pub us: u64,
    /// Name of the transport; empty if the request ended before a transport was chosen.
    pub transport: String,
}

/// ZeroMQ identity of our proxy's registration port. With it a sidecar recognises our proxy.
pub const PROXY_NAME: &str = "pd-proxy";
