//! Layout of a chunk, which both sides must agree on before a transfer.

use serde::{Deserialize, Serialize};

use crate::groups::{Group, Kind, different};

mod check;

pub use check::{GroupError, MAX_GROUPS, MAX_STATE_CHUNKS};

/// Shape of one chunk: LMCache's `KV_2LTD` = `[2, layers, tokens, heads * head_size]`, or for MLA
/// `[1, layers, tokens, latent]` with `kv_heads == 1` and `head_size == latent`.
///
/// The layout does not depend on vLLM's block size and page layout, which may differ between the
/// two sides.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layout {
    /// Model name as in the keys, without `@`.
    pub model: String,
    /// LMCache's name of the element type: `bfloat16`, `half`, `float`, `fp8_e4m3fn`, `uint8`, ….
    pub dtype: String,
    /// Number of attention layers.
    pub layers: u32,
    /// Number of KV heads of this rank; 1 for MLA.
    pub kv_heads: u32,
    /// Number of elements per head; for MLA the size of the latent.
    pub head_size: u32,
    /// True if each token has one latent instead of K and V.
    pub mla: bool,
    /// Number of tokens in a full chunk.
    pub chunk_tokens: u32,
    /// Number format and scales of a quantised cache in the engine's own words (`fp8_e4m3, scales
    /// 1`). Absent: `dtype` alone describes the elements.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub quantization: String,
    /// Groups of layers, at most 64, in the order of their parts in a chunk. The fields from `dtype`
    /// to `mla` then describe the first group only. `quantization` has a digest of all groups, so
    /// that releases without this field refuse such a layout. Absent: one group of equal layers,
    /// in LMCache's form.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
}

impl Layout {
    /// Returns the size of one element in bytes; `None` for an unknown dtype.
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

    /// Returns the size of the KV of one token in all layers, in bytes; `None` if the dtype is
    /// unknown or the product overflows. The result does not include states.
    pub fn token_bytes(&self) -> Option<u64> {
        if !self.groups.is_empty() {
            return self.sum(|group| group.kind() != Kind::State);
        }
        let planes: u64 = if self.mla { 1 } else { 2 };
        planes
            .checked_mul(u64::from(self.layers))?
            .checked_mul(u64::from(self.kv_heads))?
            .checked_mul(u64::from(self.head_size))?
            .checked_mul(self.element_bytes()?)
    }

    /// Returns the size of a full chunk in bytes, which is also the size of a slot; `None` in the
    /// same cases as [`Self::token_bytes`]. If no group has tokens, a slot has room for the whole
    /// state.
    pub fn chunk_bytes(&self) -> Option<u64> {
        let tokens = self
            .token_bytes()?
            .checked_mul(u64::from(self.chunk_tokens))?;
        if tokens > 0 {
            return Some(tokens);
        }
        self.sum(|group| group.kind() == Kind::State)
    }

    /// Returns the sum of the bytes of the chosen groups; `None` if it overflows.
    fn sum(&self, choose: impl Fn(&Group) -> bool) -> Option<u64> {
        let chosen = self.groups.iter().filter(|group| choose(group));
        chosen
            .map(|group| group.bytes)
            .try_fold(0, u64::checked_add)
    }

    /// Returns the first field in which `other` differs, as `(name, ours, theirs)`; `None` if the
    /// layouts are equal.
    pub fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        macro_rules! differ {
            ($($field:ident),*) => {
                $(if self.$field != other.$field {
                    return Some((stringify!($field), self.$field.to_string(), other.$field.to_string()));
                })*
            };
        }
        differ!(model, dtype, layers, kv_heads, head_size, mla, chunk_tokens);
        // Layouts with groups have a digest of their groups in `quantization`. The groups themselves
        // tell more, so they come first.
        if let Some((ours, theirs)) = different(&self.groups, &other.groups) {
            return Some(("groups", ours, theirs));
        }
        differ!(quantization);
        None
    }

    /// Returns LMCache's `MemoryFormat` of a chunk: `KV_2LTD` or `KV_MLA_FMT`.
    pub fn format(&self) -> u32 {
        if self.mla { 6 } else { 1 }
    }

    /// Returns the shape of a chunk with `tokens` tokens, in the form of LMCache's
    /// `AllocRequest.shape`.
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
