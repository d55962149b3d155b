//! Configurations of small state machines: chunks of four tokens, timeouts of seconds. A test
//! overrides the fields that it needs.

use std::time::Duration;

use protocol::groups::Group;
use protocol::local::Target;
use protocol::message::{AllocRequest, AllocX};
use protocol::{Epoch, Layout, receiver, sender};

/// Number of tokens of a chunk.
pub(crate) const CHUNK: u32 = 4;
pub(crate) const SECOND: Duration = Duration::from_secs(1);

pub(crate) fn layout() -> Layout {
    Layout {
        model: "m".into(),
        dtype: "float".into(),
        layers: 1,
        kv_heads: 1,
        head_size: 1,
        mla: false,
        chunk_tokens: CHUNK,
        ..Layout::example()
    }
}

/// Returns a layout with groups.
pub(crate) fn layout_of(groups: Vec<Group>) -> Layout {
    Layout { groups, ..layout() }
}

pub(crate) fn group(kind: &str, bytes: u64, size: u32) -> Group {
    Group {
        kind: kind.to_owned(),
        bytes,
        size,
    }
}

pub(crate) fn target() -> Target {
    Target {
        host: "d".into(),
        init_port: 1,
        alloc_port: 2,
    }
}

pub(crate) fn sender(slots: u32) -> sender::Config {
    sender::Config {
        id: "p".into(),
        epoch: Epoch(1),
        slots,
        layout: layout(),
        max_requests: 16,
        heartbeat: SECOND,
        wait: SECOND,
        park: SECOND / 20,
        repeat: SECOND / 2,
        link: SECOND,
        stall: 30 * SECOND,
        max_keep: 20 * SECOND,
        push_off: false,
    }
}

pub(crate) fn receiver(slots: u32) -> receiver::Config {
    receiver_of(layout(), slots)
}

/// Returns a receiver's configuration for chunks of the given layout.
pub(crate) fn receiver_of(layout: Layout, slots: u32) -> receiver::Config {
    receiver::Config {
        epoch: Epoch(2),
        slots,
        token_bytes: layout.token_bytes().expect("a plain layout"),
        chunk_tokens: layout.chunk_tokens,
        max_requests: 16,
        max_quarantined: 8,
        no_sender: 5 * SECOND,
        unclaimed: 10 * SECOND,
        max_lease: 30 * SECOND,
        max_wait: 10 * SECOND,
        lmcache_wait: SECOND,
        layout: Some(layout),
        address: Some(target()),
        max_expect: 20 * SECOND,
        seed: 7,
    }
}

pub(crate) fn keys(req: &str, chunks: u32) -> Vec<String> {
    (0..chunks).map(|i| format!("{req}/{i}")).collect()
}

/// Returns the alloc request for all chunks of a request. All chunks are full.
pub(crate) fn question(req: &str, chunks: u32, x: Option<AllocX>) -> AllocRequest {
    AllocRequest {
        keys: keys(req, chunks),
        fmt: 1,
        shape: layout().shape(CHUNK),
        dtype: "float".into(),
        last_chunk_toks: CHUNK,
        req_id: req.into(),
        is_last_batch: true,
        total_chunks: chunks,
        x,
        ..AllocRequest::example()
    }
}
