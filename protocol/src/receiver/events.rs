//! Events, actions and configuration of a [`Receiver`](super::Receiver).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::keep::{ToFetcher, ToKeeper};
use crate::local::{Await, Ended, Expect, Keeper, OfRequest, Ready, Release, Target};
use crate::message::{ToReceiver, ToSender};
use crate::plan::Chunking;
use crate::record::Record;
use crate::{EngineId, Epoch, Layout, LeaseId, Reason, SlotIndex};

/// Number of a sender's connection to the alloc socket. The receiver sends its answers to this
/// connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Route(pub u64);

/// Name in the roster of the key that a connection has proved. A name in a message proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Principal(pub String);

/// The party to which a connection, and all that it causes, belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(in crate::receiver) enum Owner {
    /// Nothing is known about the connection.
    #[default]
    Unknown,
    /// The peer has proved no key. The IP address comes from the socket, because a peer could lie in its messages.
    Host(String),
    /// The peer has proved a key.
    Principal(Principal),
}

impl Owner {
    /// Returns the owner of a connection from this host without a key. An empty host is unknown.
    pub(super) fn host(host: &str) -> Self {
        match host {
            "" => Self::Unknown,
            host => Self::Host(host.to_owned()),
        }
    }

    /// Returns false if this connection has proved a key of another party than `owner`, or if only one of the two has
    /// proved a key. Without keys every connection may act, as the message's lease id is then the only proof.
    pub(super) fn may_act_for(&self, owner: &Self) -> bool {
        match (self, owner) {
            (Self::Principal(_), _) | (_, Self::Principal(_)) => self == owner,
            _ => true,
        }
    }
}

/// Identity of one start of a sender: its name and epoch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SenderId {
    /// Name of the sidecar; for an LMCache peer, the identity of its socket.
    pub id: String,
    /// Epoch of the sidecar; 0 for LMCache.
    pub epoch: Epoch,
}

/// Limits and timeouts of a [`Receiver`](super::Receiver).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Epoch of this start of the sidecar.
    pub epoch: Epoch,
    /// Number of slots of the landing buffer.
    pub slots: u32,
    /// Size of a token's KV in bytes. If [`Self::layout`] has groups, their sizes count instead.
    pub token_bytes: u64,
    /// Number of tokens of a full chunk.
    pub chunk_tokens: u32,
    /// Maximum number of requests at the same time. The receiver refuses further requests with
    /// `busy`.
    pub max_requests: usize,
    /// Maximum number of quarantined slots per sender. A sender with more quarantined slots gets no
    /// slots.
    pub max_quarantined: u32,
    /// Maximum time for which a parked request waits for an alloc request.
    pub no_sender: Duration,
    /// Maximum time for which written chunks wait for a decode request.
    pub unclaimed: Duration,
    /// Maximum duration of a lease that a peer may ask for.
    pub max_lease: Duration,
    /// Maximum time for which the receiver holds an alloc request, even if the peer asks for more.
    pub max_wait: Duration,
    /// Maximum time for which an alloc request of LMCache waits for free slots.
    #[serde(default)]
    pub lmcache_wait: Duration,
    /// Layout of one chunk, for its groups and to check LMCache's alloc requests. Absent: one group,
    /// and the receiver refuses LMCache's requests.
    #[serde(default)]
    pub layout: Option<Layout>,
    /// Address of this rank, at which a prefill side finds it. If absent, the receiver fetches no KV.
    #[serde(default)]
    pub address: Option<Target>,
    /// Longest time for which the receiver renews the KV of a request that does not park.
    #[serde(default)]
    pub max_expect: Duration,
    /// Seed of the lease ids.
    pub seed: u64,
}

impl Config {
    /// Returns the rules that divide the KV of each request into chunks.
    pub(super) fn chunking(&self) -> Chunking {
        match &self.layout {
            Some(layout) if !layout.groups.is_empty() => Chunking::of(layout),
            _ => Chunking::plain(self.token_bytes, self.chunk_tokens),
        }
    }
}

/// A written chunk whose checksum the caller must compare before the state machine gets the
/// `Written` message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unchecked {
    /// Position in the request's keys.
    pub chunk: u32,
    /// Slot of the chunk.
    pub slot: SlotIndex,
    /// Size of the chunk in bytes.
    pub bytes: u64,
    /// Checksum in the sender's message.
    pub sum: u64,
}

/// Inputs of a [`Receiver`](super::Receiver).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A message of a sender.
    Peer {
        /// Connection on which the message came.
        route: Route,
        /// The message.
        message: ToReceiver,
    },
    /// A connection is open. This event comes before the connection's first message.
    Connected {
        /// The connection.
        route: Route,
        /// IP address of the peer's host.
        host: String,
        /// Owner of the key that the peer has proved. Absent: the peer has proved no key.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        principal: Option<Principal>,
    },
    /// The name of an LMCache peer is known. This event comes before the connection's first message
    /// without `x`. `id` begins with the peer's host and a `/`; the epoch is 0.
    Introduced {
        /// The connection.
        route: Route,
        /// The sender.
        sender: SenderId,
        /// True if the peer made its handshake with the present start of the receiver. If false,
        /// the peer has old addresses and gets no slots.
        linked: bool,
    },
    /// The answer to [`Action::CheckCanary`].
    #[serde(rename = "Looked")]
    CanaryChecked {
        /// Slots whose canaries have all been overwritten.
        gone: Vec<SlotIndex>,
        /// Slots with at least one canary that has not been overwritten.
        there: Vec<SlotIndex>,
    },
    /// The control connection of a sender is lost.
    PeerLost {
        /// The connection.
        route: Route,
    },
    /// There is proof that no write of this sender can still arrive in these slots.
    Fenced {
        /// The sender.
        sender: SenderId,
        /// Lease whose slots the proof covers. Absent: the proof covers all slots of the sender.
        lease: Option<LeaseId>,
    },
    /// The checksum of a written chunk differs from the sender's checksum.
    Corrupt(LeaseId),
    /// The decode engine has queued a request whose KV waits at a prefill side.
    Expect(EngineId, Expect),
    /// A message of a prefill side's sidecar, from its fetch port.
    Keeper {
        /// The fetch port.
        from: Keeper,
        /// The message.
        message: ToFetcher,
    },
    /// No connection to a fetch port can be made.
    KeeperLost {
        /// The fetch port.
        from: Keeper,
        /// Reason for the loss.
        reason: Reason,
    },
    /// The decode engine waits for a request's KV.
    Await(EngineId, Await),
    /// The decode engine has read chunks.
    Release(EngineId, Release),
    /// The decode engine does not want the request any more.
    Abort(EngineId, OfRequest),
    /// The engine's connection ended.
    EngineGone(EngineId),
    /// The time of [`Receiver::deadline`](super::Receiver::deadline) has passed.
    Deadline,
    /// The receiver must refuse new requests from now on.
    Drain,
}

/// Outputs of a [`Receiver`](super::Receiver), to be carried out in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Send a message to a sender.
    Send {
        /// Connection of the sender.
        route: Route,
        /// The message.
        message: ToSender,
    },
    /// Send a message to a prefill side's sidecar, and connect to it first if necessary.
    Ask {
        /// The fetch port.
        to: Keeper,
        /// The message.
        message: ToKeeper,
    },
    /// Tell an engine that chunks may be read.
    Ready(EngineId, Ready),
    /// Tell an engine that a request has ended.
    Ended(EngineId, Ended),
    /// Permit writes under this lease into this slot from now on.
    Open {
        /// The lease.
        lease: LeaseId,
        /// The slot.
        slot: SlotIndex,
    },
    /// Permit no write into this slot from now on, until the slot is opened again.
    Close {
        /// The slot.
        slot: SlotIndex,
    },
    /// The slots of this lease are quarantined: find a proof that no write can still arrive, then
    /// report [`Event::Fenced`].
    Fence {
        /// The sender.
        sender: SenderId,
        /// The lease.
        lease: LeaseId,
        /// Transport that the sender uses.
        transport: String,
    },
    /// Put canaries into this slot before the next message is sent. Canaries are random bytes;
    /// remember them until the next `Mark` of the slot.
    Mark {
        /// The slot.
        slot: SlotIndex,
    },
    /// Check in which of these slots canaries are left, then report [`Event::CanaryChecked`].
    #[serde(rename = "Look")]
    CheckCanary {
        /// The slots.
        slots: Vec<SlotIndex>,
    },
    /// Log and count a request that has ended.
    Record(Record),
}

/// Use of the landing buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gauges {
    /// Free slots.
    pub free: u32,
    /// Slots under a lease.
    pub held: u32,
    /// Quarantined slots.
    pub quarantined: u32,
    /// Requests that are parked, or that have an alloc request.
    pub requests: u32,
    /// Tokens of parked requests.
    pub parked_tokens: u64,
    /// Requests whose KV waits at a prefill side.
    #[serde(default)]
    pub expected: u32,
    /// Slots with a write in flight. If there are any, the transport must make progress.
    pub writing: u32,
}
