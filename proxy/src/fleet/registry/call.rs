//! Call-backs, by which the proxy verifies a registration.

/// A call-back that the caller has to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallBack {
    /// Id of the instance.
    pub id: String,
    /// Epoch that the answer has to repeat.
    pub epoch: u64,
    /// URL of `POST {admin}/registered`; `None` without a sidecar.
    pub url: Option<String>,
    /// URL of the health probe `GET {http}/health`, which follows if the sidecar is ready; without a
    /// sidecar it is the only probe.
    pub health: String,
    /// URL of the engine's `GET {http}/v1/models`, which is asked after `health`; `None` if the
    /// configuration gives the models.
    pub models: Option<String>,
}

/// The result of a call-back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The answer has the id and the epoch of the registration.
    Confirmed {
        /// True if the instance can take requests.
        ready: bool,
        /// The reason why the instance is not ready; empty if it is ready.
        reason: String,
    },
    /// The answer comes from another instance: its id or epoch differs.
    Stranger,
    /// There was no usable answer in time; the text says why.
    Silent(String),
}

impl Answer {
    /// The answer of an instance that can take requests.
    pub(crate) const READY: Self = Self::Confirmed {
        ready: true,
        reason: String::new(),
    };
    /// All names that [`Answer::as_str`] returns.
    pub const NAMES: [&'static str; 4] = ["ready", "not_ready", "stranger", "no_answer"];

    /// Returns the name in metrics.
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
