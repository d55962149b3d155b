//! The shape of a request: its fields and the kinds of its parts, without their values.

use super::{Message, Part, RequestBody};
use crate::openai::endpoint::Endpoint;

impl RequestBody {
    /// Returns the shape of the request: the names of its fields, and the kinds of the parts of its
    /// messages. An engine that does not push the KV of one request also pushes no KV of other
    /// requests of the same shape.
    pub(crate) fn shape(&self, endpoint: Endpoint) -> String {
        let mut names: Vec<_> = self.fields.iter().map(|field| field.name).collect();
        names.retain(|name| !name.is_empty() && self.is_set(name));
        names.sort_unstable();
        names.dedup();
        let mut parts = Vec::new();
        if endpoint == Endpoint::Chat {
            let messages: Vec<Message<'_>> = self.read("messages").unwrap_or_default();
            let contents = messages.iter().filter_map(|message| message.content);
            parts.extend(
                contents
                    .filter_map(|content| serde_json::from_str::<Vec<Part>>(content.get()).ok())
                    .flatten()
                    .filter_map(|part| part.kind),
            );
            parts.sort_unstable();
            parts.dedup();
        }
        let mut kind = format!("{} with {}", endpoint.as_str(), names.join(","));
        if !parts.is_empty() {
            kind = format!("{kind} of {}", parts.join(","));
        }
        kind.escape_debug().to_string()
    }

    /// Returns the model that the request names, as JSON; empty if the request names no model.
    pub(crate) fn model(&self) -> &str {
        self.text("model").unwrap_or_default()
    }
}
