//! Free slots of a buffer.

use std::collections::BTreeSet;

use crate::SlotIndex;

/// Set of free slots. Each slot that is not free is listed in the lease or the quarantine that owns
/// the slot.
#[derive(Debug)]
pub(crate) struct Slots {
    free: BTreeSet<u32>,
    total: u32,
}

impl Slots {
    pub(crate) fn new(total: u32) -> Self {
        Self {
            free: (0..total).collect(),
            total,
        }
    }

    pub(crate) fn total(&self) -> u32 {
        self.total
    }

    pub(crate) fn free(&self) -> u32 {
        // At most `total` slots are in the set.
        u32::try_from(self.free.len()).unwrap_or(self.total)
    }

    /// Takes the lowest free slot. Low slots have two advantages: neighbouring slots can be merged
    /// into one descriptor, and slots in frequent use stay in the CPU cache.
    pub(crate) fn take(&mut self) -> Option<SlotIndex> {
        self.free.pop_first().map(SlotIndex)
    }

    /// Frees a slot. Freeing a slot twice is a bug of the state machine. The property tests search
    /// for this bug.
    pub(crate) fn give(&mut self, slot: SlotIndex) {
        let fresh = self.free.insert(slot.0);
        debug_assert!(fresh, "slot {slot} given back twice");
    }
}
