//! Questions for the tokens of prompts, which a task asks after the prompts are answered.

use bytes::Bytes;

use crate::fleet::instance::Instance;
use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;
use crate::openai::prompt_hash::Prompt;

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
        let names: &[&str] = match endpoint {
            Endpoint::Completions => &["model", "prompt", "add_special_tokens"],
            Endpoint::Chat => &[
                "model",
                "messages",
                "add_generation_prompt",
                "continue_final_message",
                "add_special_tokens",
                "chat_template",
                "chat_template_kwargs",
                "tools",
            ],
            Endpoint::Messages | Endpoint::Responses | Endpoint::Passed(_) => return None,
        };
        let is_plain = body.fallback(endpoint).is_none() && body.sidecars_only(endpoint).is_none();
        is_plain.then(|| Self {
            url: instance.http.join("/tokenize"),
            body: body.only(names),
            prompt: prompt.clone(),
        })
    }
}

/// Maximum number of questions that wait. Further questions are dropped: the proxy then guesses.
pub(crate) const MAX_QUESTIONS: usize = 64;
