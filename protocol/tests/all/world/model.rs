//! The models of the simulated engines, and the content that their KV has in a slot.

use proptest::prelude::*;
use protocol::Layout;
use protocol::groups::Group;
use protocol::plan::Part;

use super::World;
use super::plan::RequestPlan;
use crate::setup::{group, layout, layout_of};

/// Model of both engines: the groups of its layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Model {
    /// All layers are equal.
    Plain,
    /// A window between two groups of full attention.
    Windows,
    /// Full attention and a state of three chunks.
    Hybrid,
    /// Two states, and no tokens.
    States,
    /// Windows only: the chunks before the larger window are empty.
    WindowsOnly,
    /// Local attention by chunks of other tokens than the transfer's chunks, full attention and a
    /// small state.
    Chunked,
}

/// Content of a slot: a request, and the parts of a chunk.
pub(crate) type Content = (String, Vec<Part>);

impl Model {
    /// All models with groups.
    pub(crate) const GROUPED: [Self; 5] = [
        Self::Windows,
        Self::Hybrid,
        Self::States,
        Self::WindowsOnly,
        Self::Chunked,
    ];

    pub(crate) fn layout(self) -> Layout {
        layout_of(match self {
            Self::Plain => Vec::new(),
            Self::Windows => vec![
                group("full", 8, 0),
                group("window", 4, 10),
                group("full", 2, 0),
            ],
            Self::Hybrid => vec![group("full", 8, 0), group("state", 70, 0)],
            Self::States => vec![group("state", 50, 0), group("state", 7, 0)],
            Self::WindowsOnly => vec![group("window", 8, 13), group("window", 4, 3)],
            Self::Chunked => vec![
                group("chunked", 8, 6),
                group("state", 5, 0),
                group("full", 8, 0),
            ],
        })
    }
}

/// Returns a strategy for any model.
pub(crate) fn models() -> impl Strategy<Value = Model> {
    prop_oneof![
        2 => Just(Model::Plain),
        3 => proptest::sample::select(&Model::GROUPED[..]),
    ]
}

impl World {
    /// Returns the key of each chunk of a request.
    pub(crate) fn keys(&self, plan: &RequestPlan) -> Vec<String> {
        let chunks = self.chunking.plan(plan.tokens, 0);
        let key = |chunk| match chunks.is_state(chunk) {
            false => format!("{}/{chunk}", plan.name),
            true => format!("{}@state%{}", plan.name, chunk - chunks.token_chunks()),
        };
        (0..chunks.chunks()).map(key).collect()
    }

    /// Returns the content that a chunk must have if the parts of the tokens before `have` are not
    /// moved.
    pub(crate) fn content(&self, plan: &RequestPlan, have: u32, chunk: u32) -> Content {
        let parts = self.chunking.plan(plan.tokens, have).parts(chunk);
        (plan.name.clone(), parts)
    }

    /// Returns the part of a request's KV that is not among the read parts, although the decode
    /// engine needs it; `None` if all of it was read.
    ///
    /// The search goes token by token and byte by byte, so that it finds mistakes of the plan.
    pub(crate) fn missing(&self, plan: &RequestPlan, read: &[Part]) -> Option<String> {
        let groups = match self.layout.groups.as_slice() {
            [] => vec![group("full", layout().token_bytes().unwrap_or(0), 0)],
            groups => groups.to_vec(),
        };
        groups.iter().enumerate().find_map(|(index, group)| {
            let mine: Vec<&Part> = read.iter().filter(|part| part.group == index).collect();
            if group.kind == "state" {
                let has = |byte| {
                    mine.iter()
                        .any(|p| (p.start..p.start + p.bytes).contains(&byte))
                };
                let byte = (0..group.bytes).find(|byte| !has(*byte))?;
                return Some(format!("byte {byte} of the state {index}"));
            }
            let has = |token| {
                mine.iter()
                    .any(|p| (p.tokens.0..p.tokens.1).contains(&token))
            };
            let needed = (plan.have_tokens()..plan.tokens)
                .filter(|token| is_read(group, *token, plan.tokens));
            let token = needed.into_iter().find(|token| !has(*token))?;
            Some(format!("token {token} of the group {index}"))
        })
    }
}

/// Returns true if the token `next` reads the KV of an earlier token.
fn is_read(group: &Group, token: u32, next: u32) -> bool {
    match group.kind.as_str() {
        "window" => next - token < group.size,
        "chunked" => token / group.size == next / group.size,
        _ => true,
    }
}
