//! Division of a request's KV into chunks, for layouts of one group and of several groups of layers.
//!
//! Both sides and both languages use the same plan: `python/pd_sidecar/kv/plan.py` has the same
//! functions, and `protocol/fixtures/plans.json` holds the two together.
//!
//! ```text
//! position  0          1          2          3          4          5
//!           ├──────────┼──────────┼──────────┼──────────┼──────────┤
//!           │ full     │ full     │ full     │ full     │ state    │ …
//!           │          │          │ window   │ window   │          │
//!           └──────────┴──────────┴──────────┴──────────┴──────────┘
//!            chunks of tokens, the last may be partial    chunks of the state
//! ```
//!
//! The chunks of the tokens come first. A chunk of tokens contains, for each group, the tokens that
//! the decode side needs, packed one group after the other in the layout's order. A slot has room
//! for the tokens of a full chunk in all groups. The chunks of the state follow: the states of all
//! state groups form one sequence of bytes, which is cut into pieces of one slot.

use crate::Layout;
use crate::groups::{Group, Kind};

/// Rules that divide the KV of every request of one layout into chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunking {
    groups: Vec<Members>,
    chunk_tokens: u32,
    slot_bytes: u64,
    state_bytes: u64,
}

/// Layers of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Members {
    kind: Kind,
    /// Bytes of one token in all layers; of one request for a state.
    bytes: u64,
    size: u32,
}

/// Chunks of one request. The decode side computes the token `tokens` next, and already has the
/// first `have` tokens.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    chunking: &'a Chunking,
    tokens: u32,
    have: u32,
}

/// Part of a chunk that belongs to one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Part {
    /// Index of the group in the layout; 0 in a layout without groups.
    pub group: usize,
    /// Tokens `[from, to)`; `(0, 0)` for a state.
    pub tokens: (u32, u32),
    /// First byte in the slot.
    pub offset: u64,
    /// Number of bytes.
    pub bytes: u64,
    /// For a state: first byte of this part in the group's state. 0 for tokens.
    pub start: u64,
}

impl Chunking {
    /// Returns the rules of a layout. [`Layout::check`] finds groups that these rules cannot divide;
    /// a group of an unknown kind moves nothing.
    pub fn of(layout: &Layout) -> Self {
        if layout.groups.is_empty() {
            return Self::plain(layout.token_bytes().unwrap_or(0), layout.chunk_tokens);
        }
        let members = |group: &Group| Members {
            kind: group.kind(),
            bytes: group.bytes,
            size: group.size,
        };
        Self::new(
            layout.groups.iter().map(members).collect(),
            layout.chunk_tokens,
        )
    }

    /// Returns the rules of a layout without groups.
    pub fn plain(token_bytes: u64, chunk_tokens: u32) -> Self {
        let full = Members {
            kind: Kind::Full,
            bytes: token_bytes,
            size: 0,
        };
        Self::new(vec![full], chunk_tokens)
    }

    fn new(groups: Vec<Members>, chunk_tokens: u32) -> Self {
        let sum = |state: bool| {
            let of = groups.iter().filter(|g| (g.kind == Kind::State) == state);
            of.fold(0u64, |sum, g| sum.saturating_add(g.bytes))
        };
        let (token_bytes, state_bytes) = (sum(false), sum(true));
        let tokens = token_bytes.saturating_mul(u64::from(chunk_tokens));
        Self {
            slot_bytes: if tokens > 0 { tokens } else { state_bytes },
            // The machines divide by this number; a hello with 0 is refused.
            chunk_tokens: chunk_tokens.max(1),
            state_bytes,
            groups,
        }
    }

    /// Returns the size of a slot in bytes: the tokens of a full chunk in all groups, or the whole
    /// state if no group has tokens.
    pub fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Returns the chunks of a request.
    pub fn plan(&self, tokens: u32, have: u32) -> Plan<'_> {
        Plan {
            chunking: self,
            tokens,
            have,
        }
    }
}

impl<'a> Plan<'a> {
    /// Returns the number of chunks, including the chunks of the state and the empty chunks.
    pub fn chunks(&self) -> u32 {
        self.token_chunks().saturating_add(self.state_chunks())
    }

    /// Returns the number of chunks of tokens.
    pub fn token_chunks(&self) -> u32 {
        self.tokens.div_ceil(self.chunking.chunk_tokens)
    }

    /// Returns the number of chunks of the state.
    pub fn state_chunks(&self) -> u32 {
        if self.tokens == 0 || self.chunking.state_bytes == 0 {
            return 0;
        }
        let chunks = self.chunking.state_bytes.div_ceil(self.chunking.slot_bytes);
        u32::try_from(chunks).unwrap_or(u32::MAX)
    }

    /// Returns true for a chunk of the state.
    pub fn is_state(&self, chunk: u32) -> bool {
        chunk >= self.token_chunks()
    }

    /// Returns the number of tokens that must be computed before the chunk is complete. A chunk of
    /// the state is complete when exactly this number of tokens is computed.
    pub fn needs(&self, chunk: u32) -> u32 {
        if self.is_state(chunk) {
            return self.tokens;
        }
        let end = chunk
            .saturating_add(1)
            .saturating_mul(self.chunking.chunk_tokens);
        end.min(self.tokens)
    }

    /// Returns true if nothing of the chunk has to move.
    pub fn is_empty(&self, chunk: u32) -> bool {
        if self.have >= self.tokens {
            true
        } else if self.is_state(chunk) {
            self.piece(chunk).1 == 0
        } else {
            self.spans(chunk).next().is_none()
        }
    }

    /// Returns the number of chunks that are not empty: the number of slots that the request needs
    /// at once.
    pub fn wanted(&self) -> usize {
        (0..self.chunks())
            .filter(|&chunk| !self.is_empty(chunk))
            .count()
    }

    /// Returns the size of a chunk in bytes.
    pub fn size(&self, chunk: u32) -> u64 {
        if self.have >= self.tokens {
            0
        } else if self.is_state(chunk) {
            self.piece(chunk).1
        } else {
            let bytes = self.spans(chunk).map(|(_, of, from, to)| of.span(from, to));
            bytes.fold(0, u64::saturating_add)
        }
    }

    /// Returns the parts of a chunk that are not empty, in the order of the slot.
    pub fn parts(&self, chunk: u32) -> Vec<Part> {
        if self.have >= self.tokens {
            Vec::new()
        } else if self.is_state(chunk) {
            self.state_parts(chunk)
        } else {
            let mut offset = 0;
            self.spans(chunk)
                .map(|(group, of, from, to)| {
                    let part = Part {
                        group,
                        tokens: (from, to),
                        offset,
                        bytes: of.span(from, to),
                        start: 0,
                    };
                    offset = part.offset.saturating_add(part.bytes);
                    part
                })
                .collect()
        }
    }

    /// Returns the tokens of each group in a chunk of tokens: the group's index, its layers, and the
    /// tokens `[from, to)`.
    fn spans(&self, chunk: u32) -> impl Iterator<Item = (usize, &'a Members, u32, u32)> + use<'a> {
        let plan = *self;
        let begin = chunk.saturating_mul(self.chunking.chunk_tokens);
        let end = self.needs(chunk);
        let groups = self.chunking.groups.iter().enumerate();
        groups.filter_map(move |(index, group)| {
            let from = plan.first_token(group)?.max(begin);
            (from < end).then_some((index, group, from, end))
        })
    }

    /// Returns the first token of which the decode side needs the KV of this group; `None` for a
    /// group without tokens.
    fn first_token(&self, group: &Members) -> Option<u32> {
        let first = match group.kind {
            Kind::Full => 0,
            // The window of the token `tokens` contains this token itself.
            Kind::Window => self.tokens.saturating_sub(group.size.saturating_sub(1)),
            Kind::Chunked => self.tokens - self.tokens % group.size.max(1),
            Kind::State | Kind::Unknown => return None,
        };
        Some(first.max(self.have))
    }

    /// Returns the first byte and the number of bytes of a chunk of the state, in the sequence of
    /// all states.
    fn piece(&self, chunk: u32) -> (u64, u64) {
        let slot = self.chunking.slot_bytes;
        let index = u64::from(chunk.saturating_sub(self.token_chunks()));
        let first = index.saturating_mul(slot).min(self.chunking.state_bytes);
        (first, slot.min(self.chunking.state_bytes - first))
    }

    fn state_parts(&self, chunk: u32) -> Vec<Part> {
        let (first, bytes) = self.piece(chunk);
        let last = first + bytes;
        let (mut parts, mut before) = (Vec::new(), 0);
        for (group, of) in self.chunking.groups.iter().enumerate() {
            if of.kind != Kind::State {
                continue;
            }
            let (from, to) = (first.max(before), last.min(before.saturating_add(of.bytes)));
            if from < to {
                parts.push(Part {
                    group,
                    tokens: (0, 0),
                    offset: from - first,
                    bytes: to - from,
                    start: from - before,
                });
            }
            before = before.saturating_add(of.bytes);
        }
        parts
    }
}

impl Members {
    /// Returns the bytes of the tokens `[from, to)`.
    fn span(&self, from: u32, to: u32) -> u64 {
        u64::from(to - from).saturating_mul(self.bytes)
    }
}
