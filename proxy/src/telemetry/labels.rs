//! The labels of the registered metrics: fixed names with fixed values. Text from a client or sidecar never
//! becomes a label value, because each new value would take memory for ever.

use std::fmt;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use crate::openai::fallback::Fallback;
use crate::upstream::client::LegFailure;

/// Label values of one metric: a fixed set of names, each with a fixed set of values.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Labels<const N: usize>(pub [(&'static str, &'static str); N]);

/// The kinds of messages at the registration port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A registration or heartbeat that was accepted.
    Register,
    /// A registration that was refused.
    RegisterRefused,
    /// A message with which an instance deregisters.
    Leave,
    /// A message with which a sidecar reports that its prefill engine has begun a request.
    Progress,
    /// A notice that a request's KV has been written, or will not be written.
    ProxyNotif,
    /// A message about an unknown request or instance.
    Stray,
    /// Bytes that are not a valid message.
    Malformed,
    /// A connection that was closed because there were too many connections.
    Shed,
}

/// A leg that failed, with its kind of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// A leg to the prefill instance.
    Prefill(Fallback),
    /// A leg to the decode instance.
    Decode(LegFailure),
}

/// The results of messages with KV events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvBatch {
    /// A message that was the next one.
    Applied,
    /// A message that had come before.
    Old,
    /// A message before which others were missing.
    Gap,
    /// A message that the engine sent again.
    Replayed,
    /// A message before which others are lost.
    Lost,
    /// Bytes that are not a valid message.
    Malformed,
}

/// Numbers of instances, by role (prefill, decode, both) and standing (unverified, ready, not ready).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InstanceCounts(pub [[i64; 3]; 3]);

impl Message {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Register,
        Self::RegisterRefused,
        Self::Leave,
        Self::Progress,
        Self::ProxyNotif,
        Self::Stray,
        Self::Malformed,
        Self::Shed,
    ];

    /// Returns the name of the kind in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Register => "register",
            Self::RegisterRefused => "register_refused",
            Self::Leave => "leave",
            Self::Progress => "progress",
            Self::ProxyNotif => "proxy_notif",
            Self::Stray => "stray",
            Self::Malformed => "malformed",
            Self::Shed => "shed",
        }
    }
}

impl KvBatch {
    /// Every result.
    pub const ALL: [Self; 6] = [
        Self::Applied,
        Self::Old,
        Self::Gap,
        Self::Replayed,
        Self::Lost,
        Self::Malformed,
    ];

    /// Returns the name of the result in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Old => "old",
            Self::Gap => "gap",
            Self::Replayed => "replayed",
            Self::Lost => "lost",
            Self::Malformed => "malformed",
        }
    }
}

impl Leg {
    /// Every leg with every kind of failure.
    pub const ALL: [Self; 11] = [
        Self::Prefill(Fallback::PrefillDied),
        Self::Prefill(Fallback::PrefillError),
        Self::Prefill(Fallback::PrefillBusy),
        Self::Prefill(Fallback::PrefillTimeout),
        Self::Prefill(Fallback::NotPushed),
        Self::Decode(LegFailure::Connect),
        Self::Decode(LegFailure::Died),
        Self::Decode(LegFailure::Timeout),
        Self::Decode(LegFailure::Busy),
        Self::Decode(LegFailure::Faulty),
        Self::Decode(LegFailure::Silent),
    ];

    /// Returns the names of the leg and of its failure in metrics.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Prefill(why) => ("prefill", why.as_str()),
            Self::Decode(LegFailure::Connect) => ("decode", "connect"),
            Self::Decode(LegFailure::Died) => ("decode", "died"),
            Self::Decode(LegFailure::Timeout) => ("decode", "timeout"),
            Self::Decode(LegFailure::Busy) => ("decode", "busy"),
            Self::Decode(LegFailure::Faulty) => ("decode", "error"),
            Self::Decode(LegFailure::Silent) => ("decode", "silent"),
        }
    }
}

impl<const N: usize> EncodeLabelSet for Labels<N> {
    fn encode(&self, mut encoder: LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        for label in &self.0 {
            label.encode(encoder.encode_label())?;
        }
        Ok(())
    }
}
