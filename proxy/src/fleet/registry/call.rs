//! Calling an instance back.

/// A call-back to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallBack {
    /// The sidecar's name.
    pub id: String,
    /// The sidecar's epoch.
    pub epoch: u64,
    /// Where: `POST {admin}/registered`; nowhere without a sidecar.
    pub url: Option<String>,
    /// And then, if the sidecar is ready: `GET {http}/health`.
    pub health: String,
}

/// How a call-back ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is who it says it is.
    Confirmed {
        /// A push would work.
        ready: bool,
        /// Why not.
        reason: String,
    },
    /// Somebody else answers at that address: another id or epoch.
    Stranger,
    /// No usable answer in time.
    Silent(String),
}

impl Answer {
    /// Every name of [`Answer::as_str`].
    pub const NAMES: [&'static str; 4] = ["ready", "not_ready", "stranger", "no_answer"];

    /// The name in metrics.
    pub fn as_str(&self) -> &'static str {
        let [ready, not_ready, stranger, no_answer] = Self::NAMES;
        match self {
            Self::Confirmed { ready: true, .. } => ready,
            Self::Confirmed { ready: false, .. } => not_ready,
            Self::Stranger => stranger,
            Self::Silent(_) => no_answer,
        }
    }
}
