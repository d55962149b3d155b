//! The messages of vLLM's KV events: msgpack, `[time, [event, ...], rank]`, each event a map with a `type`.

use std::fmt;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// The events of one step of an engine.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(super) events: Vec<Event>,
}

/// A message that is no batch.
#[derive(Debug, thiserror::Error)]
#[error("no batch of KV events: {0}")]
pub(crate) struct BadBatch(#[from] rmp_serde::decode::Error);

/// One event, without the fields that the proxy does not need.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) kind: Kind,
    pub(super) hashes: Vec<u64>,
    pub(super) parent: Option<u64>,
    pub(super) tokens: Vec<u32>,
    pub(super) block_tokens: Option<usize>,
    pub(super) adapter: Option<String>,
    /// A digest of the extra keys of each block, without the adapter's name; 0 if there are none.
    pub(super) extras: Vec<u64>,
    pub(super) group: Option<i64>,
    pub(super) is_on_gpu: bool,
    /// False for a group of layers that forgets the beginning of a long prompt.
    pub(super) keeps_prefixes: bool,
}

/// The kind of an event.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    Stored,
    Removed,
    Cleared,
    /// A kind of a later release.
    #[default]
    Other,
}

impl Batch {
    /// Reads a message.
    ///
    /// # Errors
    /// The message is no batch.
    pub(crate) fn read(bytes: &[u8]) -> Result<Self, BadBatch> {
        let mut deserializer = rmp_serde::Deserializer::from_read_ref(bytes);
        // Without the limit, a message of nested lists would use up the stack.
        deserializer.set_max_depth(MAX_DEPTH);
        Ok(Self::deserialize(&mut deserializer)?)
    }
}

/// Returns the digest of a block's extra keys; 0 if there are none.
pub(super) fn extras(keys: impl IntoIterator<Item = u64>) -> u64 {
    keys.into_iter().fold(0, |digest, key| {
        xxh3_64_with_seed(&key.to_le_bytes(), digest)
    })
}

/// The fields of all kinds of events.
#[derive(Deserialize)]
struct Fields {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    block_hashes: Vec<Digest>,
    #[serde(default)]
    parent_block_hash: Option<Digest>,
    #[serde(default)]
    token_ids: Vec<u32>,
    #[serde(default)]
    block_size: Option<usize>,
    #[serde(default)]
    medium: Option<String>,
    #[serde(default)]
    lora_name: Option<String>,
    #[serde(default)]
    extra_keys: Option<Vec<Option<Vec<Digest>>>>,
    #[serde(default)]
    group_idx: Option<i64>,
    #[serde(default)]
    kv_cache_spec_kind: Option<String>,
    #[serde(default)]
    locality: Option<String>,
}

impl From<Fields> for Event {
    fn from(fields: Fields) -> Self {
        let adapter = fields.lora_name.as_ref();
        let adapter = adapter.map(|name| xxh3_64(name.as_bytes()));
        let digest = |keys: &Option<Vec<Digest>>| {
            let keys = keys.iter().flatten().map(|key| key.0);
            // The key of the first block contains the adapter's name already.
            extras(keys.filter(|key| Some(*key) != adapter))
        };
        let is = |value: &Option<String>, usual: &[&str]| {
            value.as_deref().is_none_or(|text| usual.contains(&text))
        };
        Self {
            kind: match &*fields.kind {
                "BlockStored" => Kind::Stored,
                "BlockRemoved" => Kind::Removed,
                "AllBlocksCleared" => Kind::Cleared,
                _ => Kind::Other,
            },
            hashes: fields.block_hashes.iter().map(|hash| hash.0).collect(),
            parent: fields.parent_block_hash.map(|hash| hash.0),
            tokens: fields.token_ids,
            block_tokens: fields.block_size,
            extras: fields.extra_keys.iter().flatten().map(digest).collect(),
            adapter: fields.lora_name,
            group: fields.group_idx,
            is_on_gpu: is(&fields.medium, &["GPU"]) && is(&fields.locality, &["LOCAL"]),
            keeps_prefixes: is(&fields.kv_cache_spec_kind, &WHOLE_PREFIXES),
        }
    }
}

impl<'de> Deserialize<'de> for Batch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Parts;
        impl<'de> Visitor<'de> for Parts {
            type Value = Batch;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of a time and events")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Batch, A::Error> {
                let missing = || serde::de::Error::custom("a batch without events");
                parts.next_element::<IgnoredAny>()?.ok_or_else(missing)?;
                let events: Vec<Fields> = parts.next_element()?.ok_or_else(missing)?;
                while parts.next_element::<IgnoredAny>()?.is_some() {}
                let events = events.into_iter().map(Event::from).collect();
                Ok(Batch { events })
            }
        }
        deserializer.deserialize_seq(Parts)
    }
}

/// The digest of any value: a hash of a block, which is bytes or a number, or an extra key.
struct Digest(u64);

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Value;
        impl<'de> Visitor<'de> for Value {
            type Value = u64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_u64<E>(self, number: u64) -> Result<u64, E> {
                Ok(number)
            }

            fn visit_i64<E>(self, number: i64) -> Result<u64, E> {
                Ok(number.cast_unsigned())
            }

            fn visit_f64<E>(self, number: f64) -> Result<u64, E> {
                Ok(number.to_bits())
            }

            fn visit_bool<E>(self, value: bool) -> Result<u64, E> {
                Ok(u64::from(value))
            }

            fn visit_str<E>(self, text: &str) -> Result<u64, E> {
                Ok(xxh3_64(text.as_bytes()))
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<u64, E> {
                Ok(xxh3_64(bytes))
            }

            fn visit_unit<E>(self) -> Result<u64, E> {
                Ok(0)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<u64, A::Error> {
                let mut all = Vec::new();
                while let Some(Digest(item)) = items.next_element()? {
                    all.push(item);
                }
                Ok(extras(all))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<u64, A::Error> {
                let mut all = Vec::new();
                while let Some((Digest(name), Digest(value))) = items.next_entry()? {
                    all.extend([name, value]);
                }
                Ok(extras(all))
            }
        }
        deserializer.deserialize_any(Value).map(Digest)
    }
}

/// The deepest nesting of a message: a batch, its events, their extra keys and the parts of a key need eight levels.
const MAX_DEPTH: usize = 32;

/// Kinds of layers that keep the KV of every token of a prompt.
const WHOLE_PREFIXES: [&str; 4] = [
    "full_attention",
    "mla_attention",
    "sink_full_attention",
    "unknown",
];
