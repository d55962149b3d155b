//! An index of the prompt prefixes and conversations that instances hold. The index learns from earlier
//! routing decisions.
//!
//! Each entry is a guess. A wrong guess costs time, but the answer stays correct: an engine that holds
//! less KV than expected computes more. The size is bounded: the index forgets the entries that have
//! not been used for the longest time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::openai::prompt_hash::{BLOCK_BYTES, Prompt};

/// The index of prefixes and conversations.
#[derive(Debug, Default)]
pub(crate) struct PrefixIndex {
    state: Mutex<State>,
}

/// A conversation with at least one answered turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conversation {
    /// Id of the decode instance that has the conversation.
    pub decode: String,
    /// Number of turns so far.
    pub turns: u32,
    /// Estimated length of the prompt at the last turn, in tokens.
    pub tokens: u64,
    /// Time of the last turn.
    pub at: Instant,
}

/// A conversation, as `GET /conversations` shows it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Shown {
    /// Key of the conversation, made from its session or its first turn.
    pub id: String,
    /// Id of the decode instance that has the conversation.
    pub decode: String,
    /// Number of turns so far.
    pub turns: u32,
    /// Estimated length of the prompt at the last turn, in tokens.
    pub tokens: u64,
    /// Seconds since the last turn.
    pub idle_s: u64,
}

/// The result of looking up a request's prompt, which routing uses.
#[derive(Clone, Debug, Default)]
pub(crate) struct PrefixMatch {
    /// Ids of instances, each with the number of the prompt's tokens that the instance holds.
    pub held: Vec<(String, u64)>,
    /// Key and state of the conversation; `None` for a first turn.
    pub conversation: Option<(u64, Conversation)>,
    /// Estimated length of the prompt in tokens.
    pub tokens: u64,
}

/// Text after the last whole block of a prompt, and the key of the conversation that ended there.
type End = (Box<[u8]>, u64);

#[derive(Debug)]
struct State {
    /// Ids of the instances that hold the prefix with this hash, oldest first.
    holders: Recent<u64, Vec<String>>,
    /// Ends of conversations, by the hash of all whole blocks of the prompt.
    ends: Recent<u64, Vec<End>>,
    conversations: Recent<u64, Conversation>,
    /// Moving average of a token's length, in bytes of JSON text.
    bytes_per_token: f64,
    /// Number of turns of all conversations so far. The key of a new conversation depends on this number, so
    /// two conversations whose first turns are equal have different keys.
    clock: u64,
}

/// A map of at most twice `most` entries. The map forgets an entry only after at least `most` other entries
/// were used.
#[derive(Debug)]
struct Recent<K, V> {
    /// Entries that were used since `young` last became `old`; `most` entries or fewer.
    young: HashMap<K, V>,
    /// Entries that were last used before `young` last became `old`. The entries are dropped when `young`
    /// becomes `old` again.
    old: HashMap<K, V>,
    /// Maximum number of entries of each of the two maps.
    most: usize,
}

impl PrefixIndex {
    /// Looks up a prompt: its conversation, its length, and the instances that hold its beginning.
    pub(crate) fn recall(&self, prompt: &Prompt, session: Option<u64>) -> PrefixMatch {
        let mut state = self.lock();
        let tokens = state.tokens(prompt.text.len());
        let mut held: Vec<(String, u64)> = Vec::new();
        for blocks in indexed(prompt.chain.len()).rev() {
            let until = state.tokens(blocks * BLOCK_BYTES);
            let Some(holders) = state.holders.get(&prompt.chain[blocks]) else {
                continue;
            };
            for holder in holders {
                if held.iter().all(|(name, _)| name != holder) {
                    held.push((holder.clone(), until));
                }
            }
        }
        let key = session.or_else(|| state.continued(prompt));
        let conversation = key.and_then(|key| Some((key, state.conversations.get(&key)?.clone())));
        PrefixMatch {
            held,
            conversation,
            tokens,
        }
    }

    /// Records that these instances have computed or received this prompt.
    pub(crate) fn learn<'a>(
        &self,
        prompt: &Prompt,
        instances: impl IntoIterator<Item = &'a str> + Clone,
    ) {
        let mut state = self.lock();
        for blocks in indexed(prompt.chain.len()) {
            let holders = state.holders.entry(prompt.chain[blocks]);
            for name in instances.clone() {
                holders.retain(|holder| holder != name);
                holders.push(name.to_owned());
            }
            let surplus = holders.len().saturating_sub(MAX_HOLDERS);
            holders.drain(..surplus);
        }
    }

    /// Records that this decode instance has answered a turn. `known` is the key of the conversation
    /// that `recall` returned.
    pub(crate) fn turn(
        &self,
        now: Instant,
        prompt: &Prompt,
        session: Option<u64>,
        known: Option<u64>,
        decode: &str,
    ) {
        let mut state = self.lock();
        state.clock += 1;
        let last = prompt.chain.len() - 1;
        let end = prompt.chain[last];
        let key = session.or(known).unwrap_or(end ^ state.clock);
        let tokens = state.tokens(prompt.text.len());
        let ends = state.ends.entry(end);
        let text = prompt.after(last);
        ends.retain(|(other, _)| **other != *text);
        ends.push((text.into(), key));
        let surplus = ends.len().saturating_sub(MAX_HOLDERS);
        ends.drain(..surplus);
        let turns = state.conversations.get(&key).map_or(0, |c| c.turns);
        state.conversations.insert(
            key,
            Conversation {
                decode: decode.to_owned(),
                turns: turns.saturating_add(1),
                tokens,
                at: now,
            },
        );
    }

    /// Records that a prompt of this many bytes had this many tokens, which improves the estimates.
    pub(crate) fn measured(&self, bytes: usize, tokens: u64) {
        if tokens >= LEAST_TOKENS {
            let mut state = self.lock();
            let ratio = (bytes as f64 / tokens as f64).clamp(0.5, 32.0);
            state.bytes_per_token += (ratio - state.bytes_per_token) / 8.0;
        }
    }

    /// Returns the remembered conversations, the latest first.
    pub(crate) fn conversations(&self, now: Instant) -> Vec<Shown> {
        let state = self.lock();
        let all = state.conversations.young.iter();
        let mut all: Vec<_> = all.chain(&state.conversations.old).collect();
        all.sort_by_key(|(_, conversation)| std::cmp::Reverse(conversation.at));
        let show = |(key, c): &(&u64, &Conversation)| Shown {
            id: format!("{key:016x}"),
            decode: c.decode.clone(),
            turns: c.turns,
            tokens: c.tokens,
            idle_s: now.saturating_duration_since(c.at).as_secs(),
        };
        all.iter().take(MAX_SHOWN).map(show).collect()
    }

    /// Forgets all conversations and prefixes. Returns the number of conversations.
    pub(crate) fn clear(&self) -> usize {
        let mut state = self.lock();
        let count = state.conversations.len();
        *state = State {
            bytes_per_token: state.bytes_per_token,
            ..State::default()
        };
        count
    }

    /// Forgets an instance that has lost its KV: the instance is gone, or another process has its id.
    pub(crate) fn forget(&self, name: &str) {
        let mut state = self.lock();
        let state = &mut *state;
        for holders in [&mut state.holders.young, &mut state.holders.old] {
            for names in holders.values_mut() {
                names.retain(|holder| holder != name);
            }
        }
        for map in [&mut state.conversations.young, &mut state.conversations.old] {
            map.retain(|_, conversation| conversation.decode != name);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Estimates the number of tokens of a text with this many bytes.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "an estimate far below 2^63"
    )]
    #[expect(clippy::cast_sign_loss, reason = "both are positive")]
    fn tokens(&self, bytes: usize) -> u64 {
        (bytes as f64 / self.bytes_per_token) as u64
    }

    /// Returns the key of the conversation that this prompt continues: the prompt begins with the
    /// conversation's last prompt. If several conversations match, returns the conversation with the
    /// longest last prompt.
    fn continued(&mut self, prompt: &Prompt) -> Option<u64> {
        for blocks in (0..prompt.chain.len()).rev() {
            let rest = prompt.after(blocks);
            let found = self.ends.get(&prompt.chain[blocks]).and_then(|ends| {
                let longest = |(text, _): &&End| text.len();
                let begun = ends.iter().filter(|(text, _)| rest.starts_with(text));
                begun.max_by_key(longest).map(|(_, key)| *key)
            });
            if found.is_some() {
                return found;
            }
        }
        None
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            holders: Recent::new(MAX_PREFIXES),
            ends: Recent::new(MAX_CONVERSATIONS),
            conversations: Recent::new(MAX_CONVERSATIONS),
            bytes_per_token: 4.0,
            clock: 0,
        }
    }
}

impl<K: Hash + Eq + Copy, V> Recent<K, V> {
    fn new(most: usize) -> Self {
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            most,
        }
    }

    fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }

    fn get(&mut self, key: &K) -> Option<&V> {
        if let Some(value) = self.old.remove(key) {
            self.insert(*key, value);
        }
        self.young.get(key)
    }

    fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        if self.young.len() >= self.most {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }
}

impl<K: Hash + Eq + Copy, V: Default> Recent<K, V> {
    fn entry(&mut self, key: K) -> &mut V {
        if self.get(&key).is_none() {
            self.insert(key, V::default());
        }
        self.young.entry(key).or_default()
    }
}

/// Returns the lengths, in blocks, of the prefixes that are kept. Every fourth length is kept, so that
/// there is one entry per 256 bytes of a prompt.
pub(super) fn indexed(length: usize) -> impl DoubleEndedIterator<Item = usize> + ExactSizeIterator {
    (EVERY..length).step_by(EVERY)
}

/// Number of blocks between two prefixes that are kept.
const EVERY: usize = 4;
/// Maximum number of instances per prefix, and of conversations that end in the same block.
const MAX_HOLDERS: usize = 16;
/// Half of the maximum number of prefixes. Twice this number, at 256 bytes each, covers 64 MiB of
/// prompts and takes about 20 MiB.
const MAX_PREFIXES: usize = 1 << 17;
/// Half of the maximum number of conversations.
const MAX_CONVERSATIONS: usize = 1 << 14;
/// Maximum number of conversations in one answer of `GET /conversations`.
const MAX_SHOWN: usize = 1000;
/// Minimum number of tokens of a prompt that improves the estimate of a token's length.
const LEAST_TOKENS: u64 = 16;

#[cfg(test)]
mod tests;
