//! What goes into a [`Receiver`](super::Receiver) and what comes out.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::local::{Await, Ended, OfRequest, Ready, Release};
use crate::message::{ToReceiver, ToSender};
use crate::record::Record;
use crate::{EngineId, Epoch, Layout, LeaseId, SlotIndex};

/// Where answers to a sender go: one number per identity of the alloc socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Route(pub u64);

/// A sender's incarnation: its name and epoch.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SenderId {
    /// The sidecar's name; for an LMCache peer, what the socket's identity says.
    pub id: String,
    /// Its epoch; 0 for LMCache.
    pub epoch: Epoch,
}

/// Bounds and times of a [`Receiver`](super::Receiver).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// This start's epoch.
    pub epoch: Epoch,
    /// Slots of the landing buffer.
    pub slots: u32,
    /// Bytes of a token's KV, for the byte counts in records.
    pub token_bytes: u64,
    /// Tokens of a full chunk.
    pub chunk_tokens: u32,
    /// Requests known at once, parked or granted; beyond it `busy`.
    pub max_requests: usize,
    /// Slots that one sender may leave quarantined before it is refused.
    pub max_quarantined: u32,
    /// How long a parked request waits for a sender to ask.
    pub no_sender: Duration,
    /// How long written chunks wait for a decode request to park.
    pub unclaimed: Duration,
    /// Upper bounds on what a peer may ask for.
    pub max_lease: Duration,
    /// Longest time that an alloc request is held.
    pub max_wait: Duration,
    /// How long a question of LMCache's is held for room.
    #[serde(default)]
    pub lmcache_wait: Duration,
    /// What a chunk looks like, to compare with LMCache's questions; without it they are refused.
    #[serde(default)]
    pub layout: Option<Layout>,
    /// Seed of the lease ids.
    pub seed: u64,
}

/// A landed chunk whose checksum is to be compared before its `Written` is fed to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unchecked {
    /// Position in the request's keys.
    pub chunk: u32,
    /// Where it landed.
    pub slot: SlotIndex,
    /// How much of the slot it fills.
    pub bytes: u64,
    /// What the sender says.
    pub sum: u64,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A message of a sender.
    Peer {
        /// Where it came from.
        route: Route,
        /// The message.
        message: ToReceiver,
    },
    /// Before the first message of a connection: the host that it comes from.
    Connected {
        /// The connection.
        route: Route,
        /// The host's address.
        host: String,
    },
    /// Before the first message without `x` of a connection: whose it is. `id` begins with the peer's
    /// host and a `/`; the epoch is 0.
    Introduced {
        /// The connection.
        route: Route,
        /// The sender.
        sender: SenderId,
        /// It knows the slots as they are now; else it is lent none.
        linked: bool,
    },
    /// The answer to [`Action::CheckCanary`].
    #[serde(rename = "Looked")]
    CanaryChecked {
        /// Slots of which no mark is left.
        gone: Vec<SlotIndex>,
        /// Slots of which some marks still stand.
        there: Vec<SlotIndex>,
    },
    /// A sender's control connection ended.
    PeerLost {
        /// The connection.
        route: Route,
    },
    /// Proof that no write of this incarnation can still arrive in these slots (design D6).
    Fenced {
        /// The sender.
        sender: SenderId,
        /// The lease whose slots are proven; all of the sender's if absent.
        lease: Option<LeaseId>,
    },
    /// The bytes of a chunk that the sender reported as written are not the sender's.
    Corrupt(LeaseId),
    /// The decode engine waits for a request's KV.
    Await(EngineId, Await),
    /// The decode engine has read chunks.
    Release(EngineId, Release),
    /// The decode engine does not want the request any more.
    Abort(EngineId, OfRequest),
    /// The engine's connection ended.
    EngineGone(EngineId),
    /// [`Receiver::deadline`](super::Receiver::deadline) has passed.
    Deadline,
    /// No new requests from now on.
    Drain,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Send to a sender.
    Send {
        /// Where to.
        route: Route,
        /// The message.
        message: ToSender,
    },
    /// Tell an engine that chunks may be read.
    Ready(EngineId, Ready),
    /// Tell an engine that a request has ended.
    Ended(EngineId, Ended),
    /// From now on writes under this lease may land in this slot.
    Open {
        /// The lease.
        lease: LeaseId,
        /// The slot.
        slot: SlotIndex,
    },
    /// No write under any lease may land in this slot from now on. Before the slot is opened again.
    Close {
        /// The slot.
        slot: SlotIndex,
    },
    /// Slots of this lease are quarantined: find a proof, then say [`Event::Fenced`].
    Fence {
        /// The sender.
        sender: SenderId,
        /// The lease.
        lease: LeaseId,
        /// The wire that the sender named.
        transport: String,
    },
    /// Put marks all over this slot, before anything is sent: random bytes, remembered until the next
    /// `Mark` of the slot.
    Mark {
        /// The slot.
        slot: SlotIndex,
    },
    /// Look which of these slots still have marks, then say [`Event::CanaryChecked`].
    #[serde(rename = "Look")]
    CheckCanary {
        /// The slots.
        slots: Vec<SlotIndex>,
    },
    /// A request has ended.
    Record(Record),
}

/// What the buffer holds now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gauges {
    /// Slots free.
    pub free: u32,
    /// Slots under a lease.
    pub held: u32,
    /// Slots quarantined.
    pub quarantined: u32,
    /// Requests known.
    pub requests: u32,
    /// Tokens of parked requests.
    pub parked_tokens: u64,
    /// Slots into which a write is announced and not yet reported: the transport must progress.
    pub writing: u32,
}
