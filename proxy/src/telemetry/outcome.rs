//! The ways in which a request ends, for metrics and logs.

use std::fmt;

/// The outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// The engine's answer was passed on completely.
    Done,
    /// An engine refused the request (4xx), and the client has got the engine's answer.
    Refused,
    /// No engine answered; the client got an error.
    Failed,
    /// The answer broke off; the client got an error.
    Broken,
    /// The client left before the end; both legs were dropped.
    ClientLeft,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 5] = [
        Self::Done,
        Self::Refused,
        Self::Failed,
        Self::Broken,
        Self::ClientLeft,
    ];

    /// Returns the outcome's name in metrics and logs.
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
