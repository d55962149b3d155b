//! The ways in which a request ends, for metrics and logs.

use std::fmt;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// The engine's answer was passed on to its end.
    Done,
    /// An engine refused the request (4xx), and the client has its answer.
    Refused,
    /// No answer could be had; the client was told so.
    Failed,
    /// The answer broke off; the client was told so.
    Broken,
    /// The client left; both legs were dropped.
    ClientLeft,
}

impl Outcome {
    /// Every outcome, for metrics that want their label values to exist from the start.
    pub const ALL: [Self; 5] = [
        Self::Done,
        Self::Refused,
        Self::Failed,
        Self::Broken,
        Self::ClientLeft,
    ];

    /// The name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Broken => "broken",
            Self::ClientLeft => "client_left",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
