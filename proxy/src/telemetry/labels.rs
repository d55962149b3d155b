//! The labels of metrics: fixed names with fixed values, so that no stranger can make new ones.

use std::fmt;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};

use crate::openai::fallback::Fallback;
use crate::upstream::client::LegFailure;

/// Label values of one metric: a fixed set of names, each with a fixed set of values.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Labels<const N: usize>(pub [(&'static str, &'static str); N]);

/// What came to the registration port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A registration or heartbeat that was taken.
    Register,
    /// A registration that was not.
    RegisterRefused,
    /// A good-bye.
    Leave,
    /// A request has begun.
    Progress,
    /// A request's KV has been written, or will not be.
    ProxyNotif,
    /// A message about a request or instance that is not known.
    Stray,
    /// Not a message.
    Malformed,
    /// A connection beyond the limit, closed.
    Shed,
}

/// A leg that failed, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// To the prefill instance.
    Prefill(Fallback),
    /// To the decode instance.
    Decode(LegFailure),
}

/// Instances by role (prefill, decode, both) and standing (unverified, ready, not ready).
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

    /// The name.
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

impl Leg {
    /// Every way in which a leg fails.
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

    /// Its name and that of its failure.
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
