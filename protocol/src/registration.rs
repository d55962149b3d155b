//! Messages that sidecars send to the proxy's registration port, and the proxy's answers.
//!
//! Without keys the sidecar has a PUSH socket, on which no answer can come, and the proxy acknowledges a registration by
//! an HTTP call-back to the sidecar's admin port. With keys the sidecar has a DEALER socket, and the proxy also says
//! what it knows.

use serde::{Deserialize, Serialize};

use crate::{Epoch, Layout, Reason, RequestId};

/// Messages on the proxy's registration port (PUSH → PULL, with keys DEALER → ROUTER).
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

/// Messages of the proxy to a sidecar that has proved a key (ROUTER → DEALER).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
pub enum FromProxy {
    /// Answers each `Register`. The proxy sends the message again when a call-back has changed the answer.
    Registered(Registered),
    /// Names the senders and receivers of the proxy's roster: after the first `Register`, and when the
    /// roster changes. A long list has several parts.
    Peers(Peers),
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

/// Fields of `Registered`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Registered {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Name of the sidecar, as in its `Register`.
    pub id: String,
    /// Epoch of the sidecar, as in its `Register`.
    pub epoch: Epoch,
    /// True if the proxy knows the instance, and a call-back has confirmed it in the last 15 s.
    pub confirmed: bool,
    /// Reason why the proxy refuses the registration, or why its last call-back failed; at most 512
    /// characters. Absent: there is no failure.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trouble: String,
}

/// Fields of `Peers`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peers {
    /// Protocol version of the message's sender.
    pub v: u32,
    /// Random number of the list, the same in all its parts.
    pub list: u64,
    /// Index of this part.
    pub part: u32,
    /// Number of parts.
    pub parts: u32,
    /// The peers of this part.
    pub peers: Vec<Peer>,
}

/// One element of [`Peers::peers`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peer {
    /// Public key, as the roster shows it.
    pub key: String,
    /// Name in the roster.
    pub name: String,
    /// The roles: `sender`, `receiver`.
    pub roles: Vec<String>,
    /// Addresses and names of the process's hosts. Absent: any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// True if several processes use the key. Absent: one process.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replicas: bool,
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
