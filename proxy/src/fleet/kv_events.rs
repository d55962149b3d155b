//! The KV that an engine really holds, as its KV events say.
//!
//! vLLM publishes each block of tokens that its prefix cache stores or removes. Its block hashes cannot be computed
//! here, because they depend on a seed of the engine. So the proxy computes keys of its own from the tokens of each
//! stored block and from the key of its parent, and remembers which engine hash has which key.

use std::collections::{HashMap, HashSet};

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

mod batch;

pub(crate) use batch::Batch;
use batch::{Event, Kind};

/// The blocks that one rank of an engine holds. A pure state machine: the caller receives the batches.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Number of the next batch.
    next: u64,
    /// True if the publisher's numbers may begin anew with the next batch, because the connection is new.
    is_fresh: bool,
    /// True if all blocks are known: every batch since the engine's start, or since its cache was cleared, has come.
    is_complete: bool,
    /// True if a batch has come since the last connection.
    has_heard: bool,
    /// Key of each block, by the engine's hash.
    blocks: HashMap<u64, u64>,
    keys: HashSet<u64>,
    /// Tokens of a block; 0 before the first block.
    block_tokens: usize,
    /// The group of layers of which the blocks count; `None` before the first block. An engine with several groups
    /// stores each token once per group.
    group: Option<i64>,
}

/// The effect of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    /// The batch was the next one.
    Next,
    /// The batch has come before.
    Old,
    /// Batches are missing, from this number on. The batch had no effect.
    Gap(u64),
}

/// A prompt, as far as its tokens are known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tokens<'a> {
    /// Token ids of the prompt's beginning.
    pub ids: &'a [u32],
    /// True if these are all tokens of the prompt.
    pub is_whole: bool,
    /// The adapter that computes the prompt; `None` for the model itself.
    pub adapter: Option<&'a str>,
    /// The cache salt; `None` if the request has none.
    pub salt: Option<&'a str>,
}

impl Held {
    /// Notes a new connection to the publisher.
    pub(crate) fn connected(&mut self) {
        self.is_fresh = true;
    }

    /// Returns the number of the next batch.
    pub(crate) fn next(&self) -> u64 {
        self.next
    }

    /// Returns true if the blocks of the engine are known.
    pub(crate) fn is_complete(&self) -> bool {
        self.is_complete && self.has_heard
    }

    /// Returns the number of blocks.
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Applies a batch that was published. `most` limits the number of blocks.
    pub(crate) fn published(&mut self, number: u64, batch: &Batch, most: usize) -> Applied {
        // A smaller number over a new connection comes from an engine that was started again.
        if std::mem::take(&mut self.is_fresh) && number < self.next {
            self.forget();
        }
        if number < self.next {
            return Applied::Old;
        }
        if number > self.next {
            return Applied::Gap(self.next);
        }
        self.apply(number, batch, most);
        Applied::Next
    }

    /// Applies a batch that was asked for again. Batches before it may be missing, because the publisher keeps only
    /// the last ones.
    pub(crate) fn replayed(&mut self, number: u64, batch: &Batch, most: usize) {
        if number < self.next {
            return;
        }
        if number > self.next {
            self.lose(number);
        }
        self.apply(number, batch, most);
    }

    /// Forgets all blocks, because the batches before this number are lost.
    pub(crate) fn lose(&mut self, next: u64) {
        *self = Self {
            next,
            has_heard: self.has_heard,
            ..Self::default()
        };
    }

    /// Forgets all blocks, because another process may have the engine's address from now on.
    pub(crate) fn forget(&mut self) {
        *self = Self::default();
    }

    /// Returns the number of the prompt's tokens that the engine holds and can use.
    pub(crate) fn matches(&self, tokens: &Tokens<'_>) -> u64 {
        if self.block_tokens == 0 {
            return 0;
        }
        // An engine computes at least the last token of a prompt itself.
        let usable = tokens
            .ids
            .len()
            .saturating_sub(usize::from(tokens.is_whole));
        let mut key = root(tokens.adapter);
        let mut held = 0;
        for (at, block) in tokens.ids[..usable]
            .chunks_exact(self.block_tokens)
            .enumerate()
        {
            let extra = match tokens.salt {
                Some(salt) if at == 0 => batch::extras([xxh3_64(salt.as_bytes())]),
                _ => 0,
            };
            key = child(key, block, extra);
            if !self.keys.contains(&key) {
                break;
            }
            held += block.len() as u64;
        }
        held
    }

    fn apply(&mut self, number: u64, batch: &Batch, most: usize) {
        self.is_complete |= number == 0;
        self.has_heard = true;
        self.next = number.saturating_add(1);
        for event in &batch.events {
            match event.kind {
                Kind::Stored => self.store(event, most),
                Kind::Removed => self.remove(event),
                Kind::Cleared => {
                    self.blocks.clear();
                    self.keys.clear();
                    self.is_complete = true;
                }
                Kind::Other => {}
            }
        }
    }

    fn store(&mut self, event: &Event, most: usize) {
        let Some(tokens) = event.block_tokens.filter(|tokens| *tokens > 0) else {
            return;
        };
        let group = event.group.unwrap_or(0);
        // Groups with a window keep only the last blocks of a prompt, so their blocks say little about a prefix.
        if !event.is_on_gpu || !event.keeps_prefixes || *self.group.get_or_insert(group) != group {
            return;
        }
        if self.block_tokens == 0 {
            self.block_tokens = tokens;
        }
        let parent = match event.parent {
            None => Some(root(event.adapter.as_deref())),
            Some(hash) => self.blocks.get(&hash).copied(),
        };
        // The parent is not known after a loss, and a partial block has another size.
        let (Some(mut key), true) = (parent, tokens == self.block_tokens) else {
            return;
        };
        let blocks = event.tokens.chunks_exact(tokens).zip(&event.hashes);
        for (at, (block, hash)) in blocks.enumerate() {
            key = child(key, block, event.extras.get(at).copied().unwrap_or(0));
            // Blocks beyond the limit count as not held, which costs only time.
            if self.blocks.len() < most || self.blocks.contains_key(hash) {
                self.blocks.insert(*hash, key);
                self.keys.insert(key);
            }
        }
    }

    fn remove(&mut self, event: &Event) {
        let is_counted = self
            .group
            .is_none_or(|group| group == event.group.unwrap_or(0));
        if !event.is_on_gpu || !is_counted {
            return;
        }
        for hash in &event.hashes {
            if let Some(key) = self.blocks.remove(hash) {
                self.keys.remove(&key);
            }
        }
    }
}

/// Returns the key before the first block.
fn root(adapter: Option<&str>) -> u64 {
    adapter.map_or(0, |name| xxh3_64(name.as_bytes()))
}

/// Returns the key of a block after the block with the key `parent`.
fn child(parent: u64, tokens: &[u32], extra: u64) -> u64 {
    let mut bytes = [0; 4 * CHUNK];
    let mut key = parent ^ extra;
    for tokens in tokens.chunks(CHUNK) {
        for (place, token) in bytes.chunks_exact_mut(4).zip(tokens) {
            place.copy_from_slice(&token.to_le_bytes());
        }
        key = xxh3_64_with_seed(&bytes[..4 * tokens.len()], key);
    }
    key
}

/// Number of tokens that are hashed at once: a usual block.
const CHUNK: usize = 64;

#[cfg(test)]
mod tests;
