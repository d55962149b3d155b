//! The number of a prompt's tokens that each engine holds, as the engines' KV events say.
//!
//! Events name tokens, and most prompts are text. So the proxy remembers the tokens of the last prompts, which it asks
//! an engine for after it has answered a prompt. A prompt with a known beginning needs no question before it is routed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::fleet::kv_events::{Applied, Batch, Held, Tokens};
use crate::openai::prompt_hash::{BLOCK_BYTES, Prompt};
use crate::routing::prefix_index::{PrefixMatch, indexed};

/// The blocks of all engines that publish KV events, and the tokens of the last prompts.
#[derive(Debug, Default)]
pub(crate) struct KvIndex {
    engines: RwLock<HashMap<String, Arc<[Rank]>>>,
    prompts: Mutex<Prompts>,
}

/// The blocks of one rank of an engine.
#[derive(Debug, Default)]
pub(crate) struct Rank(Mutex<Held>);

/// The blocks of an engine, as `GET /instances` shows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Shown {
    /// Number of blocks that are known.
    pub blocks: usize,
    /// True if routing uses the blocks, because all blocks are known.
    pub is_complete: bool,
}

/// The properties of a request on which its blocks depend, in addition to its prompt.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Asked<'a> {
    /// The prompt's token ids, if the client has sent them.
    pub ids: Option<&'a [u32]>,
    /// The adapter that the request names; `None` for a model.
    pub adapter: Option<&'a str>,
    /// The request's cache salt; `None` if it has none.
    pub salt: Option<&'a str>,
}

/// The tokens of the last prompts, by the hashes of the prompts' beginnings. Two generations: entries that were not used
/// since the young generation became the old one are dropped when that happens again.
#[derive(Debug, Default)]
struct Prompts {
    young: HashMap<u64, Known>,
    old: HashMap<u64, Known>,
    /// Number of tokens of the whole prompts in `young`.
    young_tokens: usize,
}

/// The tokens of a prompt, or of the beginning of a prompt.
#[derive(Clone, Debug)]
enum Known {
    Whole(Arc<[u32]>),
    /// The first `until` tokens of the prompt with the key `of`. Only whole prompts keep tokens, so that the memory is
    /// bounded by their tokens.
    Beginning {
        of: u64,
        until: usize,
    },
}

/// The tokens that are found for a prompt.
struct Found {
    ids: Arc<[u32]>,
    /// Number of tokens that belong to the prompt's beginning.
    until: usize,
    is_whole: bool,
}

impl KvIndex {
    /// Adds an engine with this number of ranks, without any block.
    pub(crate) fn add(&self, id: &str, ranks: usize) -> Arc<[Rank]> {
        let ranks: Arc<[Rank]> = (0..ranks).map(|_| Rank::default()).collect();
        let mut engines = self.engines.write().unwrap_or_else(PoisonError::into_inner);
        engines.insert(id.to_owned(), Arc::clone(&ranks));
        ranks
    }

    /// Removes an engine.
    pub(crate) fn remove(&self, id: &str) {
        let mut engines = self.engines.write().unwrap_or_else(PoisonError::into_inner);
        engines.remove(id);
    }

    /// Forgets the blocks of an engine, because another process may have its id from now on.
    pub(crate) fn forget(&self, id: &str) {
        let engines = self.engines.read().unwrap_or_else(PoisonError::into_inner);
        for rank in engines.get(id).into_iter().flat_map(|ranks| ranks.iter()) {
            rank.lock().forget();
        }
    }

    /// Returns true if an engine publishes events.
    pub(crate) fn is_used(&self) -> bool {
        let engines = self.engines.read().unwrap_or_else(PoisonError::into_inner);
        !engines.is_empty()
    }

    /// Returns the blocks of an engine; `None` if the proxy reads no events of it.
    pub(crate) fn shown(&self, id: &str) -> Option<Shown> {
        let engines = self.engines.read().unwrap_or_else(PoisonError::into_inner);
        let ranks = engines.get(id)?;
        Some(Shown {
            blocks: ranks.iter().map(|rank| rank.lock().len()).sum(),
            is_complete: ranks.iter().all(|rank| rank.lock().is_complete()),
        })
    }

    /// Replaces the guesses about engines by what their events say. The guess about an engine stays if not all of its
    /// blocks are known, or if the prompt's tokens are not known. Returns true if all tokens of the prompt are known.
    pub(crate) fn refine(
        &self,
        known: &mut PrefixMatch,
        prompt: &Prompt,
        asked: Asked<'_>,
    ) -> bool {
        let engines = self.engines.read().unwrap_or_else(PoisonError::into_inner);
        if engines.is_empty() {
            return true;
        }
        let found = match asked.ids {
            Some(_) => None,
            None => self.lock().find(prompt),
        };
        let (ids, is_whole) = match (asked.ids, &found) {
            (Some(ids), _) => (ids, true),
            (None, Some(found)) => (&found.ids[..found.until], found.is_whole),
            (None, None) => return false,
        };
        let tokens = Tokens {
            ids,
            is_whole,
            adapter: asked.adapter,
            salt: asked.salt,
        };
        for (id, ranks) in engines.iter() {
            let of_rank = |rank: &Rank| {
                let held = rank.lock();
                held.is_complete().then(|| held.matches(&tokens))
            };
            // The engine chooses the rank itself, so the best rank is the best guess.
            let best = ranks.iter().map(of_rank).collect::<Option<Vec<_>>>();
            if let Some(best) = best.and_then(|all| all.into_iter().max()) {
                known.held.retain(|(holder, _)| holder != id);
                known.held.push((id.clone(), best));
            }
        }
        if is_whole {
            known.tokens = ids.len() as u64;
        }
        is_whole
    }

    /// Remembers the tokens of a prompt.
    pub(crate) fn learn(&self, prompt: &Prompt, ids: &[u32]) {
        if (1..=MAX_PROMPT_TOKENS).contains(&ids.len()) {
            self.lock().learn(prompt, ids);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Prompts> {
        self.prompts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rank {
    /// Notes a new connection. Returns the number of the next batch.
    pub(crate) fn connected(&self) -> u64 {
        let mut held = self.lock();
        held.connected();
        held.next()
    }

    /// Applies a batch that was published.
    pub(crate) fn published(&self, number: u64, batch: &Batch) -> Applied {
        self.lock().published(number, batch, MAX_BLOCKS)
    }

    /// Applies a batch that was asked for again.
    pub(crate) fn replayed(&self, number: u64, batch: &Batch) {
        self.lock().replayed(number, batch, MAX_BLOCKS);
    }

    /// Forgets all blocks, because the batches before this number are lost.
    pub(crate) fn lose(&self, next: u64) {
        self.lock().lose(next);
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Prompts {
    /// Returns the tokens of the prompt or of its longest known beginning.
    fn find(&mut self, prompt: &Prompt) -> Option<Found> {
        let beginnings = indexed(prompt.chain.len()).rev();
        let beginnings = beginnings.map(|blocks| prompt.chain[blocks]);
        std::iter::once(end(prompt))
            .chain(beginnings)
            .find_map(|key| self.found(key))
    }

    fn found(&mut self, key: u64) -> Option<Found> {
        match self.get(key)? {
            Known::Whole(ids) => Some(Found {
                until: ids.len(),
                ids,
                is_whole: true,
            }),
            Known::Beginning { of, until } => match self.get(of)? {
                Known::Whole(ids) => Some(Found {
                    until: until.min(ids.len()),
                    ids,
                    is_whole: false,
                }),
                Known::Beginning { .. } => None,
            },
        }
    }

    fn learn(&mut self, prompt: &Prompt, ids: &[u32]) {
        let of = end(prompt);
        if self.found(of).is_some() {
            return;
        }
        let mut common = None;
        for blocks in indexed(prompt.chain.len()).rev() {
            let key = prompt.chain[blocks];
            let until = match (self.found(key), common) {
                // The longest beginning in common with an earlier prompt: the tokens in common are the beginning's
                // tokens.
                (Some(before), None) => {
                    let pairs = before.ids.iter().zip(ids);
                    let until = pairs.take_while(|(a, b)| a == b).count();
                    common = Some(until);
                    until
                }
                (Some(before), Some(until)) => before.until.min(until),
                (None, _) => (ids.len() * blocks * BLOCK_BYTES).div_ceil(prompt.text.len().max(1)),
            };
            self.insert(key, Known::Beginning { of, until });
        }
        self.insert(of, Known::Whole(ids.into()));
    }

    fn get(&mut self, key: u64) -> Option<Known> {
        if let Some(known) = self.old.remove(&key) {
            self.insert(key, known);
        }
        self.young.get(&key).cloned()
    }

    fn insert(&mut self, key: u64, known: Known) {
        self.old.remove(&key);
        if self.young.len() >= MAX_ENTRIES || self.young_tokens >= MAX_TOKENS {
            self.old = std::mem::take(&mut self.young);
            self.young_tokens = 0;
        }
        if let Known::Whole(ids) = &known {
            self.young_tokens += ids.len();
        }
        self.young.insert(key, known);
    }
}

/// Returns the hash of the whole prompt.
fn end(prompt: &Prompt) -> u64 {
    let last = prompt.chain.len() - 1;
    xxh3_64_with_seed(prompt.after(last), !prompt.chain[last])
}

/// Maximum number of blocks of one rank: 4 million tokens in blocks of 16, which take about 16 MiB.
const MAX_BLOCKS: usize = 1 << 18;
/// The longest prompt that is remembered, in tokens.
const MAX_PROMPT_TOKENS: usize = 1 << 20;
/// Number of tokens of a generation: 32 MiB. One prompt may exceed the number.
const MAX_TOKENS: usize = 1 << 23;
/// Number of entries of a generation.
const MAX_ENTRIES: usize = 1 << 17;

#[cfg(test)]
mod tests;
