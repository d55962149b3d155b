//! What two sides must agree on before a byte of KV moves.

use serde::{Deserialize, Serialize};

/// The shape of one chunk: LMCache's `KV_2LTD` = `[2, layers, tokens, heads * head_size]`, or for
/// MLA `[1, layers, tokens, latent]` with `kv_heads == 1` and `head_size == latent`.
///
/// Independent of vLLM's block size and page layout: those may differ between the two sides.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layout {
    /// Model name as it stands in keys (no `@`).
    pub model: String,
    /// LMCache's name of the element type: `float`, `half`, `bfloat16`, `fp8_e4m3fn`, ….
    pub dtype: String,
    /// Attention layers.
    pub layers: u32,
    /// KV heads of this rank.
    pub kv_heads: u32,
    /// Elements per head, or the MLA latent size.
    pub head_size: u32,
    /// One latent per token instead of K and V.
    pub mla: bool,
    /// Tokens per full chunk.
    pub chunk_tokens: u32,
    /// What the elements stand for where `dtype` says only how wide they are: the engine's name of
    /// the format and its scales (`fp8_e4m3, scales 1`). Empty: `dtype` says all.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub quantization: String,
}

impl Layout {
    /// Bytes of one element, or `None` for a dtype that nobody here knows.
    pub fn element_bytes(&self) -> Option<u64> {
        Some(match self.dtype.as_str() {
            "double" | "int64" => 8,
            "float" | "int32" => 4,
            "half" | "bfloat16" | "int16" => 2,
            "int8" | "uint8" | "bool" | "fp8_e4m3fn" | "fp8_e4m3fnuz" | "fp8_e5m2"
            | "fp8_e5m2fnuz" => 1,
            _ => return None,
        })
    }

    /// Bytes of KV of one token over all layers; `None` for an unknown dtype or an absurd shape.
    pub fn token_bytes(&self) -> Option<u64> {
        let planes: u64 = if self.mla { 1 } else { 2 };
        planes
            .checked_mul(u64::from(self.layers))?
            .checked_mul(u64::from(self.kv_heads))?
            .checked_mul(u64::from(self.head_size))?
            .checked_mul(self.element_bytes()?)
    }

    /// Bytes of a full chunk: the size of a slot.
    pub fn chunk_bytes(&self) -> Option<u64> {
        self.token_bytes()?
            .checked_mul(u64::from(self.chunk_tokens))
    }

    /// The first field in which `other` differs, as `(name, ours, theirs)`.
    pub fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        macro_rules! differ {
            ($($field:ident),*) => {
                $(if self.$field != other.$field {
                    return Some((stringify!($field), self.$field.to_string(), other.$field.to_string()));
                })*
            };
        }
        differ!(
            model,
            dtype,
            layers,
            kv_heads,
            head_size,
            mla,
            chunk_tokens,
            quantization
        );
        None
    }

    /// LMCache's `MemoryFormat` of a chunk: `KV_2LTD` or `KV_MLA_FMT`.
    pub fn format(&self) -> u32 {
        if self.mla { 6 } else { 1 }
    }

    /// The shape of a chunk of `tokens` tokens as LMCache's `AllocRequest.shape` states it.
    pub fn shape(&self, tokens: u32) -> Vec<u64> {
        let planes = if self.mla { 1 } else { 2 };
        vec![
            planes,
            u64::from(self.layers),
            u64::from(tokens),
            u64::from(self.kv_heads) * u64::from(self.head_size),
        ]
    }
}

/// Chunks that `tokens` tokens need.
pub fn chunks_of(tokens: u32, chunk_tokens: u32) -> u32 {
    tokens.div_ceil(chunk_tokens)
}

/// The tokens `[from, to)` that chunk `index` holds, of a request of `tokens` tokens whose first
/// `first_token` tokens the decode side has: the chunk that contains the mark begins there.
pub fn chunk_span(index: u32, tokens: u32, first_token: u32, chunk_tokens: u32) -> (u32, u32) {
    let from = index.saturating_mul(chunk_tokens);
    let to = from.saturating_add(chunk_tokens).min(tokens);
    (from.max(first_token).min(to), to)
}
