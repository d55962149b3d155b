//! Marks in slots that are lent to LMCache's senders: random bytes all over a slot, by which one can see
//! later whether it was written (protocol: `receiver/lmcache.rs`).

use std::collections::BTreeMap;
use std::io;

use protocol::SlotIndex;

use crate::memory::Buffer;

/// What was put into which slot.
#[derive(Debug, Default)]
pub(super) struct Marks {
    marks: BTreeMap<SlotIndex, [u8; MARK_BYTES]>,
}

impl Marks {
    /// Puts a fresh mark all over a slot.
    ///
    /// # Errors
    /// Those of the buffer: the slot lies outside of it.
    pub(super) fn put(&mut self, buffer: &Buffer, slot: SlotIndex, bytes: u64) -> io::Result<()> {
        let mark: [u8; MARK_BYTES] = rand::random();
        for at in places(bytes) {
            buffer.copy_in(u64::from(slot.0) * bytes + at, &mark)?;
        }
        self.marks.insert(slot, mark);
        Ok(())
    }

    /// Whether every mark of a slot is gone; not if it never had one, or cannot be read.
    pub(super) fn gone(&self, buffer: &Buffer, slot: SlotIndex, bytes: u64) -> bool {
        let Some(mark) = self.marks.get(&slot) else {
            return false;
        };
        // The last first: it is the one that most likely still stands.
        places(bytes).rev().all(|at| {
            let mut found = [0; MARK_BYTES];
            let read = buffer.copy_out(u64::from(slot.0) * bytes + at, &mut found);
            read.is_ok() && found != *mark
        })
    }
}

/// Where the marks of a slot of `bytes` stand: at each step from its start on, and at its very end.
fn places(bytes: u64) -> impl DoubleEndedIterator<Item = u64> {
    let step = (bytes / MAX_MARKS)
        .max(STEP_BYTES)
        .next_multiple_of(STEP_BYTES);
    let last = bytes.saturating_sub(MARK_BYTES as u64);
    let steps = last.div_ceil(step);
    (0..steps).map(move |i| i * step).chain([last])
}

/// Nobody writes the same by chance.
const MARK_BYTES: usize = 16;
/// No wire delivers less at once: the packets of RDMA have 4 KiB, the copies of the kernel whole pages.
const STEP_BYTES: u64 = 4096;
/// Marks of a slot: putting or reading one takes 0.3 µs.
const MAX_MARKS: u64 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn slots_of(bytes: u64) -> (std::sync::Arc<Buffer>, Marks) {
        let buffer = Buffer::memfd("marks", 2 * bytes).unwrap();
        let mut marks = Marks::default();
        marks.put(&buffer, SlotIndex(1), bytes).unwrap();
        (buffer, marks)
    }

    #[test]
    fn one_that_still_stands_is_seen() {
        for bytes in [16, 4096, 5000, 1 << 20, 9_000_000] {
            let (buffer, marks) = slots_of(bytes);
            assert!(!marks.gone(&buffer, SlotIndex(1), bytes), "nothing written");
            let data = vec![7; usize::try_from(bytes).unwrap()];
            buffer.copy_in(bytes, &data).unwrap();
            assert!(
                marks.gone(&buffer, SlotIndex(1), bytes),
                "all of it written"
            );
            for place in places(bytes).step_by(97).chain([bytes - 16]) {
                let (buffer, marks) = slots_of(bytes);
                let at = usize::try_from(place).unwrap();
                buffer.copy_in(bytes, &data[..at]).unwrap();
                buffer
                    .copy_in(bytes + place + 16, &data[at + 16..])
                    .unwrap();
                assert!(
                    !marks.gone(&buffer, SlotIndex(1), bytes),
                    "all but {place} of {bytes}"
                );
            }
        }
    }

    #[test]
    fn a_slot_without_marks_is_not_taken_for_written() {
        let (buffer, marks) = slots_of(4096);
        assert!(!marks.gone(&buffer, SlotIndex(0), 4096));
    }
}
