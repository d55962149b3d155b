//! The engines' endpoints that this proxy serves.

use crate::openai::passed::PassedOn;

/// The endpoint that a request uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/messages`, Anthropic's endpoint for chats.
    Messages,
    /// `/v1/responses`, OpenAI's endpoint for chats that the engine may store.
    Responses,
    /// An endpoint whose requests are passed whole to one decode instance.
    Passed(&'static PassedOn),
}

impl Endpoint {
    /// Returns the path, which is the same at this proxy and at the engines.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
            Self::Messages => "/v1/messages",
            Self::Responses => "/v1/responses",
            Self::Passed(passed) => passed.path,
        }
    }

    /// Returns the name in metrics. All endpoints that are passed on share one name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
            Self::Messages => "messages",
            Self::Responses => "responses",
            Self::Passed(_) => "passed",
        }
    }

    /// Returns the name in logs and records: the path if the requests are passed on.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Passed(passed) => passed.path,
            _ => self.as_str(),
        }
    }

    /// Returns true if the engine generates tokens, so that the answer's duration depends on the load of the
    /// instance.
    pub(crate) fn generates(self) -> bool {
        !matches!(self, Self::Passed(passed) if !passed.is_generating())
    }

    /// Returns true if the request is a probe, which gets no record and no log line.
    pub(crate) fn is_probe(self) -> bool {
        matches!(self, Self::Passed(passed) if passed.is_probe())
    }

    /// Returns the names of all endpoints in metrics, so that metrics have all label values from the start.
    pub(crate) fn names() -> [&'static str; 5] {
        ["completions", "chat", "messages", "responses", "passed"]
    }
}
