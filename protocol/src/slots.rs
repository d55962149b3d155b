//! Which slots of a buffer are free.

use std::collections::BTreeSet;

use crate::SlotIndex;

/// The free slots. Held and quarantined ones are named by the lease or quarantine that owns them.
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

    /// Takes the lowest free slot: neighbours make one descriptor, and low slots stay in cache.
    pub(crate) fn take(&mut self) -> Option<SlotIndex> {
        self.free.pop_first().map(SlotIndex)
    }

    /// Gives a slot back. A slot that is free already is a bug of the machine, which its property
    /// tests look for.
    pub(crate) fn give(&mut self, slot: SlotIndex) {
        let fresh = self.free.insert(slot.0);
        debug_assert!(fresh, "slot {slot} given back twice");
    }
}
