//! Free slots of a buffer.

use std::collections::BTreeSet;

use crate::SlotIndex;

/// Set of free slots. The lease or quarantine that owns a slot names it.
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

    /// Takes the lowest free slot. Neighbouring slots make one descriptor, and low slots stay in
    /// the cache.
    pub(crate) fn take(&mut self) -> Option<SlotIndex> {
        self.free.pop_first().map(SlotIndex)
    }

    /// Frees a slot. To free a slot twice is a bug of the state machine, which the property tests
    /// look for.
    pub(crate) fn give(&mut self, slot: SlotIndex) {
        let fresh = self.free.insert(slot.0);
        debug_assert!(fresh, "slot {slot} given back twice");
    }
}
