//! The table of the endpoints whose requests are passed whole to one decode instance.

/// An endpoint whose requests are passed whole to one decode instance.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PassedOn {
    /// The path, which is the same at this proxy and at the engines.
    pub path: &'static str,
    /// The methods, as in vLLM.
    pub methods: Methods,
    work: Work,
}

/// The HTTP methods of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Methods {
    /// `GET`
    Get,
    /// `POST`
    Post,
    /// `GET` and `POST`
    GetPost,
    /// `GET` and `DELETE`
    GetDelete,
}

/// The work that a request causes at the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Work {
    /// No work. As at vLLM, no API key is necessary. The request gets no record.
    Probe,
    /// Work without generated tokens. The body may have any form.
    Compute,
    /// A question about a stored response, whose id is in the path. Only the instance that holds the response
    /// can answer.
    Stored,
    /// Generated tokens. The body is JSON, and must not carry transfer parameters.
    Generate,
    /// A WebSocket: messages in both directions, as long as both sides want.
    Session,
}

impl PassedOn {
    const fn new(path: &'static str, methods: Methods, work: Work) -> Self {
        Self {
            path,
            methods,
            work,
        }
    }

    /// Returns true if this is the endpoint's path.
    pub(crate) fn is_at(&self, path: &str) -> bool {
        match self.path.split_once("{id}") {
            Some((before, after)) => path
                .strip_prefix(before)
                .and_then(|rest| rest.strip_suffix(after))
                .is_some_and(|id| !id.is_empty() && !id.contains('/')),
            None => self.path == path,
        }
    }

    /// Returns true if the request causes no work: every client may send it, and it gets no record.
    pub(crate) fn is_probe(&self) -> bool {
        self.work == Work::Probe
    }

    /// Returns true if the path names a stored response.
    pub(crate) fn is_of_stored(&self) -> bool {
        self.work == Work::Stored
    }

    /// Returns true if the client opens a WebSocket.
    pub(crate) fn is_session(&self) -> bool {
        self.work == Work::Session
    }

    /// Returns true if the engine generates tokens. The proxy then reads the body as JSON.
    pub(crate) fn is_generating(&self) -> bool {
        self.work == Work::Generate
    }
}

impl Methods {
    /// Returns the methods as documents write them.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::GetPost => "GET, POST",
            Self::GetDelete => "GET, DELETE",
        }
    }
}

/// SageMaker's endpoint, which takes the bodies of several other endpoints.
pub(crate) const INVOCATIONS: &str = "/invocations";

use Methods::{Get, GetDelete, GetPost, Post};
use Work::{Compute, Generate, Probe, Session, Stored};

/// The endpoints. A request for an endpoint that the engine does not have (`/v1/embeddings` of a model that
/// generates text, for example) gets the engine's own 404.
pub static PASSED_ON: [PassedOn; 24] = [
    PassedOn::new("/version", Get, Probe),
    PassedOn::new("/ping", GetPost, Probe),
    PassedOn::new("/load", Get, Probe),
    PassedOn::new("/tokenize", Post, Compute),
    PassedOn::new("/detokenize", Post, Compute),
    PassedOn::new("/tokenizer_info", Get, Compute),
    PassedOn::new("/v1/embeddings", Post, Compute),
    PassedOn::new("/v2/embed", Post, Compute),
    PassedOn::new("/pooling", Post, Compute),
    PassedOn::new("/classify", Post, Compute),
    PassedOn::new("/score", Post, Compute),
    PassedOn::new("/v1/score", Post, Compute),
    PassedOn::new("/rerank", Post, Compute),
    PassedOn::new("/v1/rerank", Post, Compute),
    PassedOn::new("/v2/rerank", Post, Compute),
    PassedOn::new("/generative_scoring", Post, Compute),
    PassedOn::new("/v1/messages/count_tokens", Post, Compute),
    PassedOn::new("/v1/audio/transcriptions", Post, Compute),
    PassedOn::new("/v1/audio/translations", Post, Compute),
    PassedOn::new("/v1/realtime", Get, Session),
    // vLLM 0.32 answers 405 to DELETE.
    PassedOn::new("/v1/responses/{id}", GetDelete, Stored),
    PassedOn::new("/v1/responses/{id}/cancel", Post, Stored),
    // vLLM's model of this request has no field for transfer parameters.
    PassedOn::new("/v1/chat/completions/batch", Post, Generate),
    // The body decides: a chat or a completion is split over two instances, all else is passed on.
    PassedOn::new(INVOCATIONS, Post, Generate),
];
