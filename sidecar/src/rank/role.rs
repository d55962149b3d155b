//! Names the two roles of a rank.

/// The role of one rank in a transfer. A process with the role `both` has both roles for each rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum RankRole {
    /// Pushes KV.
    Sender,
    /// Receives KV.
    Receiver,
}

impl RankRole {
    /// Returns the name in metrics and logs.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Sender => "sender",
            Self::Receiver => "receiver",
        }
    }
}
