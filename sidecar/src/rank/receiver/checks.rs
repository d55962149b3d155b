//! Compares the checksums of landed chunks.
//!
//! A separate thread compares the checksums, one message at a time. A sum reads megabytes, and the runtime has
//! only one thread, which must not be busy for that long. A chunk is in the queue at most once, so the number
//! of slots limits the queue's length.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use protocol::LeaseId;
use protocol::message::Written;
use protocol::receiver::{Route, Unchecked};
use tokio::task::JoinHandle;
use tracing::error;

use crate::memory::Buffer;

/// The messages with chunks to compare.
#[derive(Debug, Default)]
pub(super) struct Checks {
    /// The messages in the order in which they came. The thread sums the chunks of the first message.
    queue: VecDeque<Check>,
    running: Option<JoinHandle<bool>>,
    /// The chunks of the messages in the queue.
    under: BTreeSet<(LeaseId, u32)>,
    /// Connections that ended while one of their messages was in the queue.
    lost: BTreeSet<Route>,
}

#[derive(Debug)]
struct Check {
    route: Route,
    written: Written,
    chunks: Vec<Unchecked>,
    buffer: Arc<Buffer>,
    slot_bytes: u64,
}

/// A message whose chunks were compared.
#[derive(Debug)]
pub(super) struct Checked {
    pub(super) route: Route,
    pub(super) written: Written,
    /// True if the checksums of all chunks are equal to the sender's.
    pub(super) sound: bool,
    /// True if the connection has ended meanwhile and this was its last message.
    pub(super) lost: bool,
}

impl Checks {
    /// Queues those chunks of a message whose checksum must be computed. Returns the message without the chunks
    /// that are now in the queue; `None` if the queue has all of them.
    pub(super) fn take(
        &mut self,
        route: Route,
        mut written: Written,
        mut chunks: Vec<Unchecked>,
        buffer: &Arc<Buffer>,
        slot_bytes: u64,
    ) -> Option<Written> {
        let lease = written.lease;
        chunks.retain(|c| !self.under.contains(&(lease, c.chunk)));
        self.under.extend(chunks.iter().map(|c| (lease, c.chunk)));
        let named = written.chunks.iter().zip(&written.indexes);
        let (chunks_left, indexes_left): (Vec<u32>, Vec<u32>) = named
            .filter(|(chunk, _)| !self.under.contains(&(lease, **chunk)))
            .unzip();
        if !chunks.is_empty() {
            let checked = Written {
                chunks: chunks.iter().map(|c| c.chunk).collect(),
                indexes: chunks.iter().map(|c| c.slot.0).collect(),
                sums: Vec::new(),
                ..written
            };
            self.queue.push_back(Check {
                route,
                written: checked,
                chunks,
                buffer: Arc::clone(buffer),
                slot_bytes,
            });
            self.start();
        }
        let all_wait = chunks_left.is_empty() && !written.chunks.is_empty();
        written.chunks = chunks_left;
        written.indexes = indexes_left;
        written.sums = Vec::new();
        (!all_wait).then_some(written)
    }

    /// Returns true if a message of this connection is still in the queue. The end of the connection then waits
    /// for the message.
    pub(super) fn lost(&mut self, route: Route) -> bool {
        let waits = self.queue.iter().any(|check| check.route == route);
        if waits {
            self.lost.insert(route);
        }
        waits
    }

    /// Returns the next message whose chunks were compared.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Checked {
        let Some(running) = &mut self.running else {
            return std::future::pending().await;
        };
        let sound = running.await.unwrap_or_else(|error| {
            error!(%error, "cannot compare checksums: the chunks count as wrong");
            false
        });
        self.running = None;
        let Some(check) = self.queue.pop_front() else {
            return std::future::pending().await; // the thread runs only for a message in the queue
        };
        for chunk in &check.chunks {
            self.under.remove(&(check.written.lease, chunk.chunk));
        }
        self.start();
        let route = check.route;
        let is_last = !self.queue.iter().any(|check| check.route == route);
        Checked {
            route,
            written: check.written,
            sound,
            lost: is_last && self.lost.remove(&route),
        }
    }

    fn start(&mut self) {
        if self.running.is_some() {
            return;
        }
        if let Some(check) = self.queue.front() {
            let (lease, chunks) = (check.written.lease, check.chunks.clone());
            let (buffer, slot_bytes) = (Arc::clone(&check.buffer), check.slot_bytes);
            self.running = Some(tokio::task::spawn_blocking(move || {
                chunks
                    .iter()
                    .all(|chunk| is_sound(lease, chunk, &buffer, slot_bytes))
            }));
        }
    }
}

fn is_sound(lease: LeaseId, chunk: &Unchecked, buffer: &Buffer, slot_bytes: u64) -> bool {
    let landed = buffer.sum(u64::from(chunk.slot.0) * slot_bytes, chunk.bytes);
    let sound = landed.ok() == Some(chunk.sum);
    if !sound {
        error!(%lease, chunk = chunk.chunk, slot = %chunk.slot, "checksum of a landed chunk differs");
    }
    sound
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::{Epoch, SlotIndex};

    const LEASE: LeaseId = LeaseId(5);
    const BYTES: u64 = 4096;

    fn written(chunks: &[u32]) -> Written {
        Written {
            lease: LEASE,
            epoch: Epoch(1),
            chunks: chunks.to_vec(),
            indexes: chunks.to_vec(),
            sums: vec![0; chunks.len()],
            ..Written::example()
        }
    }

    fn unchecked(chunks: &[u32], sum: u64) -> Vec<Unchecked> {
        let of = |&chunk| Unchecked {
            chunk,
            slot: SlotIndex(chunk),
            bytes: BYTES,
            sum,
        };
        chunks.iter().map(of).collect()
    }

    /// Checks that a repeated message does not cause a second checksum of a chunk. Also checks that the results
    /// come in order, and before the event that ends the connection.
    #[tokio::test]
    async fn a_chunk_is_summed_once_however_often_it_is_said() {
        let buffer = Buffer::memfd("checks", 4 * BYTES).unwrap();
        let right = buffer.sum(0, BYTES).unwrap();
        let (a, b) = (Route(1), Route(2));
        let mut checks = Checks::default();
        let mut take = |route, chunks: &[u32], sum| {
            let (written, sums) = (written(chunks), unchecked(chunks, sum));
            checks.take(route, written, sums, &buffer, BYTES)
        };
        assert_eq!(take(a, &[0, 1], right), None);
        for _ in 0..500 {
            assert_eq!(take(a, &[0, 1], right), None, "a repetition");
        }
        assert_eq!(take(b, &[1, 2], right + 1), None);
        let known = take(a, &[], right).map(|w| w.chunks);
        assert_eq!(known, Some(Vec::new()), "nothing to compare");
        assert!(checks.lost(a) && !checks.lost(Route(3)));
        assert_eq!(checks.queue.len(), 2);
        let first = checks.next().await;
        assert_eq!((first.route, first.sound, first.lost), (a, true, true));
        assert_eq!(first.written.chunks, [0, 1]);
        let second = checks.next().await;
        assert_eq!((second.route, second.sound, second.lost), (b, false, false));
        assert_eq!(second.written.chunks, [2], "the other one is not its");
        assert!(checks.under.is_empty() && checks.queue.is_empty());
    }
}
