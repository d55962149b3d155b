//! Hashes of a prompt's beginning, block by block. The hashes identify a prompt without tokenising
//! it.

use http::HeaderMap;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::openai::body::RequestBody;
use crate::openai::endpoint::Endpoint;

/// A prompt's text and the hashes of its prefixes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Prompt {
    /// The prompt as JSON, without the characters that close it. So a longer prompt that continues this
    /// prompt begins with the same bytes.
    pub text: Vec<u8>,
    /// `chain[i]` is the hash of the first `i` blocks, the model, the salt, the tools and the template
    /// arguments.
    pub chain: Vec<u64>,
}

impl Prompt {
    /// Reads the prompt of a request.
    pub(crate) fn of(body: &RequestBody, endpoint: Endpoint) -> Self {
        let field = match endpoint {
            Endpoint::Completions => "prompt",
            Endpoint::Chat | Endpoint::Messages | Endpoint::Passed(_) => "messages",
            Endpoint::Responses => "input",
        };
        let text = body.json(field).unwrap_or_default().trim_ascii_end();
        let text = text
            .strip_suffix(['"', ']'])
            .unwrap_or(text)
            .trim_ascii_end();
        let mut seed = 0;
        // Each adapter has its own model name, and engines share no KV between requests with different
        // salts. Most chat templates put the tools and the system's message at the beginning of the prompt.
        for name in PREFIX_FIELDS {
            seed = xxh3_64_with_seed(body.json(name).unwrap_or_default().as_bytes(), seed);
        }
        Self::new(text.as_bytes(), seed)
    }

    fn new(text: &[u8], seed: u64) -> Self {
        let mut hash = seed;
        let mut chain = Vec::with_capacity(text.len() / BLOCK_BYTES + 1);
        chain.push(hash);
        for block in text.chunks_exact(BLOCK_BYTES).take(MAX_BLOCKS) {
            hash = xxh3_64_with_seed(block, hash);
            chain.push(hash);
        }
        Self {
            text: text.to_vec(),
            chain,
        }
    }

    /// Returns the text after the first `blocks` blocks.
    pub(crate) fn after(&self, blocks: usize) -> &[u8] {
        self.text.get(blocks * BLOCK_BYTES..).unwrap_or_default()
    }
}

/// Returns the hash of the session that a request names in the header `x-session-id` or `session-id`, or
/// in one of OpenAI's fields. LMCache's proxy also reads `x-session-id`.
pub(crate) fn session(headers: &HeaderMap, body: &RequestBody) -> Option<u64> {
    let header = ["x-session-id", "session-id"]
        .into_iter()
        .find_map(|name| headers.get(name))
        .map(|value| value.as_bytes());
    let named = header.or_else(|| {
        ["prompt_cache_key", "session_id", "user"]
            .into_iter()
            .find_map(|name| body.json(name))
            .map(str::as_bytes)
    });
    named.map(xxh3_64)
}

/// Fields that stand before the prompt's own text, or that keep equal prompts apart.
const PREFIX_FIELDS: [&str; 6] = [
    "model",
    "cache_salt",
    "tools",
    "chat_template_kwargs",
    "system",
    "instructions",
];

/// Size of a block in bytes. A block is small, so that even a short question at the end of a prompt begins a
/// new block.
pub(crate) const BLOCK_BYTES: usize = 64;

/// Maximum number of blocks that are hashed: 4 MiB of text, about a million tokens.
const MAX_BLOCKS: usize = 1 << 16;
