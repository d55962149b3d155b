//! Questions for the tokens of prompts, which a task asks after the prompts are answered.

use bytes::Bytes;

use crate::fleet::instance::Instance;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;
use crate::openai::prompt_hash::Prompt;
use crate::openai::tokenize;

/// A question for the tokens of a prompt.
#[derive(Debug)]
pub(crate) struct Question {
    /// URL of the engine's `/tokenize`.
    pub url: String,
    /// Body of the question.
    pub body: Bytes,
    /// The prompt.
    pub prompt: Prompt,
}

impl Question {
    /// Returns the question that gives a request's tokens; `None` if there is none. Only completions and chats have
    /// one, and the tokens of images are not known before the engine computes them.
    pub(crate) fn of(
        body: &RequestBody,
        endpoint: Endpoint,
        prompt: &Prompt,
        instance: &Instance,
    ) -> Option<Self> {
        let is_plain = body.fallback(endpoint).is_none() && body.sidecars_only(endpoint).is_none();
        let body = is_plain
            .then(|| tokenize::body_of(body, endpoint))
            .flatten()?;
        Some(Self {
            url: instance.http.join("/tokenize"),
            body,
            prompt: prompt.clone(),
        })
    }
}

/// Maximum number of questions that wait. Further questions are dropped: the proxy then guesses.
pub(crate) const MAX_QUESTIONS: usize = 64;
