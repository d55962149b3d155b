//! Merges the first token from one engine and the remaining tokens from another engine into one answer.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde_json::{Value, json};

use crate::connectors::answer::FirstToken;
use crate::openai::endpoint::Endpoint;
use crate::openai::sse::end_of_event;

/// Converts the decode leg's answer into the client's answer. The first token and the other tokens get
/// the same id, model and time.
#[derive(Clone, Debug)]
pub(crate) struct Merger {
    form: Form,
    id: String,
    model: Value,
    created: u64,
    first: FirstToken,
    /// The beginning of an incomplete event. The code that forwards the answer limits the event's
    /// length.
    partial: Vec<u8>,
    /// Number of bytes at the beginning of `partial` that need no further search, because they contain no end
    /// of an event.
    searched: usize,
}

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Completion,
    Chat,
}

impl Merger {
    /// Creates the merger for the answer to the request `id`. `model` is JSON.
    pub(crate) fn new(
        endpoint: Endpoint,
        id: &str,
        model: Option<&str>,
        first: FirstToken,
    ) -> Self {
        // Only these two endpoints have answers that can be merged.
        let (form, kind) = match endpoint {
            Endpoint::Completions => (Form::Completion, "cmpl"),
            _ => (Form::Chat, "chatcmpl"),
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            form,
            id: format!("{kind}-{id}"),
            model: model
                .and_then(|text| serde_json::from_str(text).ok())
                .unwrap_or_default(),
            created: since.unwrap_or_default().as_secs(),
            first,
            partial: Vec::new(),
            searched: 0,
        }
    }

    /// Returns the events that the client gets before the decode leg is sent.
    pub(crate) fn head(&self) -> Bytes {
        let mut out = Vec::new();
        if self.form == Form::Chat {
            self.event(
                &mut out,
                json!({"role": "assistant", "content": ""}),
                &Value::Null,
            );
        }
        let text = Value::from(self.first.text.as_str());
        let delta = match self.form {
            Form::Completion => text,
            Form::Chat => json!({"content": text}),
        };
        self.event(&mut out, delta, &Value::Null);
        out.into()
    }

    /// Returns the whole stream of an answer that ends with its first token.
    pub(crate) fn only_head(&self) -> Bytes {
        let mut out = self.head().to_vec();
        let delta = match self.form {
            Form::Completion => json!(""),
            Form::Chat => json!({}),
        };
        self.event(&mut out, delta, &json!(self.first.finish_reason));
        out.extend_from_slice(b"data: [DONE]\n\n");
        out.into()
    }

    /// Converts a piece of the decode leg's stream into the bytes that the client gets. The result is
    /// empty until an event is complete.
    pub(crate) fn chunk(&mut self, chunk: &[u8]) -> Bytes {
        self.partial.extend_from_slice(chunk);
        let mut out = Vec::with_capacity(chunk.len());
        let mut from = 0;
        let mut searched = self.searched;
        while let Some(length) = end_of_event(&self.partial[from..], searched) {
            let event = &self.partial[from..from + length];
            from += length;
            searched = 0;
            self.converted(&mut out, event);
        }
        self.partial.drain(..from);
        self.searched = self.partial.len();
        out.into()
    }

    /// Converts the decode leg's whole answer into the client's answer.
    pub(crate) fn whole(&self, body: &Bytes) -> Bytes {
        let Ok(mut answer) = serde_json::from_slice::<Value>(body) else {
            return body.clone();
        };
        self.count(&mut answer);
        let choice = answer["choices"][0].take();
        let text = format!(
            "{}{}",
            self.first.text,
            choice["text"].as_str().unwrap_or_default()
        );
        self.finish(answer, text, &choice["finish_reason"])
    }

    /// Returns the whole answer, not streamed, of a request that ends with its first token.
    pub(crate) fn whole_head(&self, prompt_tokens: Option<u64>) -> Bytes {
        let prompt = prompt_tokens.unwrap_or_default();
        let usage =
            json!({"prompt_tokens": prompt, "completion_tokens": 1, "total_tokens": prompt + 1});
        let answer = json!({"usage": usage});
        self.finish(
            answer,
            self.first.text.clone(),
            &json!(self.first.finish_reason),
        )
    }

    fn finish(&self, mut answer: Value, text: String, reason: &Value) -> Bytes {
        let choice = match self.form {
            Form::Completion => {
                json!({"index": 0, "text": text, "logprobs": null, "finish_reason": reason})
            }
            Form::Chat => json!({"index": 0, "logprobs": null, "finish_reason": reason,
                "message": {"role": "assistant", "content": text}}),
        };
        answer["id"] = json!(self.id);
        answer["object"] = json!(self.object(false));
        answer["created"] = json!(self.created);
        answer["model"] = self.model.clone();
        answer["choices"] = json!([choice]);
        answer.to_string().into()
    }

    fn converted(&self, out: &mut Vec<u8>, event: &[u8]) {
        let data = event.strip_prefix(b"data:").map(<[u8]>::trim_ascii);
        let parsed = data.and_then(|data| serde_json::from_slice::<Value>(data).ok());
        // `[DONE]`, comments and errors are passed on unchanged.
        let Some(mut answer) = parsed.filter(|answer| answer["choices"].is_array()) else {
            out.extend_from_slice(event);
            return;
        };
        self.count(&mut answer);
        let choice = answer["choices"].get_mut(0).map(Value::take);
        match choice {
            Some(choice) => {
                let text = &choice["text"];
                let delta = match self.form {
                    Form::Completion => text.clone(),
                    Form::Chat => json!({"content": text}),
                };
                answer["choices"] = json!([self.choice(delta, &choice["finish_reason"])]);
            }
            None => answer["choices"] = json!([]),
        }
        self.write(out, answer);
    }

    fn event(&self, out: &mut Vec<u8>, delta: Value, reason: &Value) {
        self.write(out, json!({"choices": [self.choice(delta, reason)]}));
    }

    fn write(&self, out: &mut Vec<u8>, mut answer: Value) {
        answer["id"] = json!(self.id);
        answer["object"] = json!(self.object(true));
        answer["created"] = json!(self.created);
        answer["model"] = self.model.clone();
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(answer.to_string().as_bytes());
        out.extend_from_slice(b"\n\n");
    }

    fn choice(&self, delta: Value, reason: &Value) -> Value {
        let name = match self.form {
            Form::Completion => "text",
            Form::Chat => "delta",
        };
        json!({"index": 0, name: delta, "logprobs": null, "finish_reason": reason})
    }

    fn object(&self, stream: bool) -> &'static str {
        match (self.form, stream) {
            (Form::Completion, _) => "text_completion",
            (Form::Chat, true) => "chat.completion.chunk",
            (Form::Chat, false) => "chat.completion",
        }
    }

    /// Corrects the token counts: the decode engine counts the first token as part of the prompt.
    fn count(&self, answer: &mut Value) {
        let usage = &mut answer["usage"];
        if let (Some(prompt), Some(answered)) = (
            usage["prompt_tokens"].as_u64(),
            usage["completion_tokens"].as_u64(),
        ) {
            usage["prompt_tokens"] = json!(prompt.saturating_sub(1));
            usage["completion_tokens"] = json!(answered + 1);
        }
    }
}

#[cfg(test)]
mod tests;
