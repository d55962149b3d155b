//! The question for the tokens of a prompt: `POST /tokenize`.

use bytes::Bytes;

use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;

/// Returns the body of `POST /tokenize` that gives the tokens of a request's prompt; `None` if the endpoint's prompts
/// have no such question. Only completions and chats have one.
pub(crate) fn body_of(body: &RequestBody, endpoint: Endpoint) -> Option<Bytes> {
    // Every field that changes the tokens of the prompt, in the form that `/tokenize` takes.
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
    Some(body.only(names))
}
