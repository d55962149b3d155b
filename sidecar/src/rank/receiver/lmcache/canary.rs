//! Writes canaries into the slots that are lent to LMCache's senders. A canary is a random pattern that is
//! copied all over a slot; later the pattern shows whether the slot was written (protocol:
//! `receiver/lmcache.rs`).

use std::collections::BTreeMap;
use std::io;

use protocol::SlotIndex;

use crate::memory::{Buffer, Rows};

/// The canary of each slot that was lent.
#[derive(Debug, Default)]
pub(crate) struct Canaries {
    canaries: BTreeMap<SlotIndex, [u8; MARK_BYTES]>,
}

impl Canaries {
    /// Writes a fresh canary all over a slot.
    ///
    /// # Errors
    /// The buffer's error: the slot lies outside of the buffer.
    pub(crate) fn put(&mut self, buffer: &Buffer, slot: SlotIndex, bytes: u64) -> io::Result<()> {
        let mark: [u8; MARK_BYTES] = rand::random();
        let start = u64::from(slot.0) * bytes;
        let (rows, count) = steps(start, bytes);
        buffer.copy_in_rows(rows, &mark.repeat(count))?;
        buffer.copy_in(start + last(bytes), &mark)?;
        self.canaries.insert(slot, mark);
        Ok(())
    }

    /// Returns true if every copy of a slot's canary was overwritten. Returns false if the slot never had a
    /// canary or cannot be read.
    pub(crate) fn gone(&self, buffer: &Buffer, slot: SlotIndex, bytes: u64) -> bool {
        let Some(mark) = self.canaries.get(&slot) else {
            return false;
        };
        // The check begins with the last copy, because an incomplete write has most likely not written the
        // slot's end.
        let start = u64::from(slot.0) * bytes;
        let mut end = [0; MARK_BYTES];
        if buffer.copy_out(start + last(bytes), &mut end).is_err() || end == *mark {
            return false;
        }
        let (rows, count) = steps(start, bytes);
        let mut found = vec![0; count * MARK_BYTES];
        buffer.copy_out_rows(rows, &mut found).is_ok()
            && found.chunks_exact(MARK_BYTES).all(|found| found != mark)
    }
}

/// Returns the places of all copies of a canary except the last one, and the number of these copies. The slot
/// begins at `start` and has `bytes` bytes. The first copy is at the slot's start, and the copies have equal
/// distances.
fn steps(start: u64, bytes: u64) -> (Rows, usize) {
    let step = (bytes / MAX_MARKS)
        .max(STEP_BYTES)
        .next_multiple_of(STEP_BYTES);
    // The number is at most `MAX_MARKS`.
    let count = usize::try_from(last(bytes).div_ceil(step)).unwrap_or(0);
    let rows = Rows {
        offset: start,
        step,
        width: MARK_BYTES,
    };
    (rows, count)
}

/// Returns the offset of the last copy, at the very end of the slot.
fn last(bytes: u64) -> u64 {
    bytes.saturating_sub(MARK_BYTES as u64)
}

/// Bytes of a canary. With this length no data equals a canary by chance.
const MARK_BYTES: usize = 16;
/// Minimum distance between two copies, in bytes. With a smaller distance the check would find nothing more,
/// because no wire delivers fewer bytes in one step: RDMA packets have 4 KiB, and the kernel copies whole
/// pages.
const STEP_BYTES: u64 = 4096;
/// Maximum number of copies in a slot. Writing or reading one copy takes 0.3 µs in host memory; in GPU memory
/// all copies together take the time of two copies.
const MAX_MARKS: u64 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn places(bytes: u64) -> impl Iterator<Item = u64> {
        let (rows, count) = steps(0, bytes);
        (0..count as u64)
            .map(move |i| i * rows.step)
            .chain([last(bytes)])
    }

    fn slots_of(bytes: u64) -> (std::sync::Arc<Buffer>, Canaries) {
        let buffer = Buffer::memfd("marks", 2 * bytes).unwrap();
        let mut canaries = Canaries::default();
        canaries.put(&buffer, SlotIndex(1), bytes).unwrap();
        (buffer, canaries)
    }

    #[test]
    fn one_that_still_stands_is_seen() {
        for bytes in [16, 4096, 5000, 1 << 20, 9_000_000] {
            let (buffer, canaries) = slots_of(bytes);
            assert!(
                !canaries.gone(&buffer, SlotIndex(1), bytes),
                "nothing written"
            );
            let data = vec![7; usize::try_from(bytes).unwrap()];
            buffer.copy_in(bytes, &data).unwrap();
            assert!(
                canaries.gone(&buffer, SlotIndex(1), bytes),
                "all of it written"
            );
            for place in places(bytes).step_by(97).chain([bytes - 16]) {
                let (buffer, canaries) = slots_of(bytes);
                let at = usize::try_from(place).unwrap();
                buffer.copy_in(bytes, &data[..at]).unwrap();
                buffer
                    .copy_in(bytes + place + 16, &data[at + 16..])
                    .unwrap();
                assert!(
                    !canaries.gone(&buffer, SlotIndex(1), bytes),
                    "all but {place} of {bytes}"
                );
            }
        }
    }

    #[test]
    fn a_slot_without_marks_is_not_taken_for_written() {
        let (buffer, canaries) = slots_of(4096);
        assert!(!canaries.gone(&buffer, SlotIndex(0), 4096));
    }
}
