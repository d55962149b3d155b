//! Reasons for refusals and early ends. A reason is a label of counters, a field of messages and a
//! word in log lines.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Reason of a refusal, or of the early end of a request or lease.
        ///
        /// A name from a newer peer becomes [`Reason::Unknown`], so that messages stay readable.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Reason {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
            /// A reason that this version does not know.
            #[serde(other, rename = "unknown")]
            Unknown,
        }

        impl Reason {
            /// Every reason, so that metrics can have all label values from the start.
            pub const ALL: &'static [Self] = &[$(Self::$name,)* Self::Unknown];

            /// The name on the wire, in metrics and in logs.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                    Self::Unknown => "unknown",
                }
            }
        }
    };
}

reasons! {
    /// The landing buffer had no room within the allowed time.
    NoRoom = "no_room",
    /// The send buffer had no room within the allowed time.
    NoSendRoom = "no_send_room",
    /// The request needs more slots than one host may have (15/16 of all slots), and its decode request is not parked.
    TooLarge = "too_large",
    /// The prefill request was cancelled, its client left, or its connector waited too long for slots.
    Cancelled = "cancelled",
    /// The decode request was aborted or its client left.
    Unwanted = "unwanted",
    /// The prefill or decode engine closed its socket.
    EngineGone = "engine_gone",
    /// The other sidecar's connection ended.
    PeerLost = "peer_lost",
    /// No init handshake could be made with the receiver, or the two sides have no transport in
    /// common.
    NoLink = "no_link",
    /// The receiver did not answer an alloc request in time.
    AllocTimeout = "alloc_timeout",
    /// The lease expired because the sender sent no message.
    LeaseExpired = "lease_expired",
    /// The decode request waited longer than its deadline, or a request of a sender made no progress for too long.
    Deadline = "deadline",
    /// No sender asked for slots for this request in time.
    NoSender = "no_sender",
    /// The KV is written or kept, but no decode request asked for it in time.
    Unclaimed = "unclaimed",
    /// No KV is kept under this token.
    NotKept = "not_kept",
    /// The message or the lease belongs to an epoch other than the receiver's present epoch.
    StaleEpoch = "stale_epoch",
    /// The two sides compute different keys for the same request.
    KeyMismatch = "key_mismatch",
    /// Model, dtype, quantisation, shape or chunk size differ.
    LayoutMismatch = "layout_mismatch",
    /// The two sides speak different versions of the protocol.
    VersionMismatch = "version_mismatch",
    /// The receiver has no engine, so it has no slots yet.
    NoEngine = "no_engine",
    /// Another request with this id is in progress, or this message was answered before.
    Duplicate = "duplicate",
    /// This peer has caused too many quarantined slots.
    Quarantined = "quarantined",
    /// The transport failed to move the bytes.
    TransferFailed = "transfer_failed",
    /// The checksum of the landed bytes differs from the sender's checksum.
    BadSum = "bad_sum",
    /// The process is shutting down.
    Draining = "draining",
    /// Too many requests are in progress at the same time.
    Busy = "busy",
    /// The message makes no sense in this state.
    BadRequest = "bad_request",
    /// A flag switches pushes off, or the engine moves no KV of this request.
    PushOff = "push_off",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
