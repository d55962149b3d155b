//! Controls which lease may write into which slot, so that [`close`](SlotGates::close) is a fence.
//!
//! A receiving thread holds the slot's lock in shared mode during one receive, which never waits. Under the
//! lock, the thread checks that the slot was not closed since the write was admitted. A call of `close` takes
//! the lock in exclusive mode. So the call waits for at most one bounded copy per connection that writes into
//! the slot, and no copy begins after the call. The connection itself stays open: its thread reads and drops
//! the bytes that still arrive for the closed slot.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use protocol::{LeaseId, SlotIndex};

use super::frame::{Part, Refusal};

/// The gates of a receiver's buffer, across all its slot layouts.
#[derive(Debug, Default)]
pub(super) struct SlotGates {
    layout: Mutex<Arc<SlotLayout>>,
}

/// One slot layout, with a gate for each slot.
#[derive(Debug, Default)]
pub(super) struct SlotLayout {
    slot_bytes: u64,
    gates: Vec<RwLock<SlotGate>>,
}

#[derive(Debug, Default)]
struct SlotGate {
    open_to: Option<LeaseId>,
    /// The principal of the lease; `None` if the lease has none.
    owner: Option<Arc<str>>,
    /// The number of openings so far. A write that was admitted through an earlier opening does not pass,
    /// even if the slot was opened again to the same lease.
    opening: u64,
}

/// A part that was admitted through an open gate.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pass {
    slot: u32,
    opening: u64,
    /// The part's first byte, as an offset in the buffer.
    pub(super) offset: u64,
    /// Bytes of the part.
    pub(super) bytes: u64,
}

/// The peer of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    /// The peer has proved the key of this member of the roster.
    Member(Arc<str>),
    /// The peer has proved no key. It may write for members if their data needs no protection.
    Unknown { for_members: bool },
}

impl Writer {
    fn may_write_for(&self, owner: Option<&str>) -> bool {
        match (self, owner) {
            (Self::Member(name), owner) => owner == Some(&**name),
            (Self::Unknown { .. }, None) => true,
            (Self::Unknown { for_members }, Some(_)) => *for_members,
        }
    }
}

impl SlotGates {
    /// Closes every gate and begins a new layout with `slots` slots of `slot_bytes` bytes.
    pub(super) fn divide(&self, slots: u32, slot_bytes: u64) {
        let new = Arc::new(SlotLayout {
            slot_bytes,
            gates: (0..slots).map(|_| RwLock::default()).collect(),
        });
        let old = std::mem::replace(
            &mut *self.layout.lock().unwrap_or_else(PoisonError::into_inner),
            new,
        );
        (0..old.slots()).for_each(|slot| old.close(slot));
    }

    /// Returns the present slot layout.
    pub(super) fn current(&self) -> Arc<SlotLayout> {
        Arc::clone(&self.layout.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Lets writes under `lease`, which belongs to the principal `owner`, land in `slot` from now on.
    pub(super) fn open(&self, lease: LeaseId, owner: Option<&Arc<str>>, slot: SlotIndex) {
        let layout = self.current();
        let Some(gate) = layout.gate(slot.0) else {
            tracing::error!(%slot, %lease, slots = layout.slots(), "a slot that does not exist was opened");
            return;
        };
        let mut gate = gate.write().unwrap_or_else(PoisonError::into_inner);
        gate.open_to = Some(lease);
        gate.owner = owner.cloned();
        gate.opening += 1;
    }

    /// Closes a slot's gate: no byte lands in `slot` after this call.
    pub(super) fn close(&self, slot: SlotIndex) {
        self.current().close(slot.0);
    }
}

impl SlotLayout {
    /// Returns the number of slots; 0 before the first slot layout.
    pub(super) fn slots(&self) -> u32 {
        // `divide` made the gates from a u32.
        u32::try_from(self.gates.len()).unwrap_or(u32::MAX)
    }

    /// Returns the bytes of a slot.
    pub(super) fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Returns the leases with an open slot.
    pub(super) fn open_leases(&self) -> HashSet<LeaseId> {
        let gates = self.gates.iter();
        gates
            .filter_map(|gate| gate.read().unwrap_or_else(PoisonError::into_inner).open_to)
            .collect()
    }

    /// Admits a part under `lease` from this writer, or returns the reason for the refusal.
    pub(super) fn admit(
        &self,
        lease: LeaseId,
        writer: &Writer,
        part: Part,
    ) -> Result<Pass, Refusal> {
        let gate = self.gate(part.slot).ok_or(Refusal::Bounds)?;
        let end = part.offset.checked_add(part.bytes).ok_or(Refusal::Bounds)?;
        if end > self.slot_bytes {
            return Err(Refusal::Bounds);
        }
        let gate = gate.read().unwrap_or_else(PoisonError::into_inner);
        // A member of the roster that knows another member's lease gets the answer for an unknown lease.
        if gate.open_to != Some(lease) || !writer.may_write_for(gate.owner.as_deref()) {
            return Err(Refusal::Closed);
        }
        Ok(Pass {
            slot: part.slot,
            opening: gate.opening,
            offset: u64::from(part.slot) * self.slot_bytes + part.offset,
            bytes: part.bytes,
        })
    }

    /// Runs `copy`, which must not wait, while the lock keeps the gate open. Returns `None` if the gate was
    /// closed since the part was admitted.
    pub(super) fn through<T>(&self, pass: &Pass, copy: impl FnOnce() -> T) -> Option<T> {
        let gate = self.gate(pass.slot)?;
        let gate = gate.read().unwrap_or_else(PoisonError::into_inner);
        (gate.open_to.is_some() && gate.opening == pass.opening).then(copy)
    }

    fn close(&self, slot: u32) {
        if let Some(gate) = self.gate(slot) {
            let mut gate = gate.write().unwrap_or_else(PoisonError::into_inner);
            gate.open_to = None;
        }
    }

    fn gate(&self, slot: u32) -> Option<&RwLock<SlotGate>> {
        self.gates.get(usize::try_from(slot).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    const LEASE: LeaseId = LeaseId(5);
    const ANYBODY: Writer = Writer::Unknown { for_members: true };

    fn part(slot: u32, offset: u64, bytes: u64) -> Part {
        Part {
            slot,
            offset,
            bytes,
        }
    }

    #[test]
    fn only_the_lease_passes_and_only_within_the_slot() {
        let gates = SlotGates::default();
        let refusal = |lease, part| gates.current().admit(lease, &ANYBODY, part).map(drop);
        assert_eq!(refusal(LEASE, part(0, 0, 1)), Err(Refusal::Bounds));
        gates.divide(4, 100);
        gates.open(LEASE, None, SlotIndex(2));
        gates.open(LEASE, None, SlotIndex(4));
        for (lease, part, expect) in [
            (LEASE, part(2, 0, 100), Ok(())),
            (LEASE, part(2, 99, 1), Ok(())),
            (LEASE, part(2, 99, 2), Err(Refusal::Bounds)),
            (LEASE, part(2, u64::MAX, 2), Err(Refusal::Bounds)),
            (LEASE, part(4, 0, 1), Err(Refusal::Bounds)),
            (LEASE, part(u32::MAX, 0, 1), Err(Refusal::Bounds)),
            (LEASE, part(1, 0, 1), Err(Refusal::Closed)),
            (LeaseId(6), part(2, 0, 1), Err(Refusal::Closed)),
        ] {
            assert_eq!(refusal(lease, part), expect, "{lease} {part:?}");
        }
        let pass = gates
            .current()
            .admit(LEASE, &ANYBODY, part(2, 7, 3))
            .unwrap();
        assert_eq!((pass.offset, pass.bytes), (207, 3));
    }

    /// A lease's id is enough for a writer only where data needs no protection. Else the connection's key must be the
    /// lease's.
    #[test]
    fn a_lease_belongs_to_its_principal() {
        let member = |name: &str| Writer::Member(name.into());
        let stranger = Writer::Unknown { for_members: false };
        let gates = SlotGates::default();
        gates.divide(2, 10);
        gates.open(LEASE, Some(&"a".into()), SlotIndex(0));
        gates.open(LEASE, None, SlotIndex(1));
        for (writer, slot, expect) in [
            (member("a"), 0, true),
            (member("b"), 0, false),
            (stranger.clone(), 0, false),
            (ANYBODY, 0, true),
            (member("a"), 1, false),
            (stranger, 1, true),
        ] {
            let admitted = gates.current().admit(LEASE, &writer, part(slot, 0, 1));
            assert_eq!(admitted.is_ok(), expect, "{writer:?} {slot}");
        }
    }

    #[test]
    fn a_pass_ends_with_its_opening() {
        let gates = SlotGates::default();
        gates.divide(2, 10);
        gates.open(LEASE, None, SlotIndex(1));
        let layout = gates.current();
        let pass = layout.admit(LEASE, &ANYBODY, part(1, 0, 1)).unwrap();
        assert_eq!(layout.through(&pass, || 1), Some(1));
        gates.close(SlotIndex(1));
        assert_eq!(layout.through(&pass, || 1), None);
        gates.open(LEASE, None, SlotIndex(1));
        assert_eq!(layout.through(&pass, || 1), None, "the old opening");
        let pass = layout.admit(LEASE, &ANYBODY, part(1, 0, 1)).unwrap();
        gates.divide(2, 10);
        gates.open(LEASE, None, SlotIndex(1));
        assert_eq!(layout.through(&pass, || 1), None, "the old cut");
    }

    #[test]
    fn closing_waits_for_who_is_inside() {
        let gates = Arc::new(SlotGates::default());
        gates.divide(1, 10);
        gates.open(LEASE, None, SlotIndex(0));
        let layout = gates.current();
        let pass = layout.admit(LEASE, &ANYBODY, part(0, 0, 1)).unwrap();
        let inside = Barrier::new(2);
        let landed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                layout.through(&pass, || {
                    inside.wait();
                    std::thread::yield_now();
                    landed.store(true, Ordering::SeqCst);
                })
            });
            inside.wait();
            gates.close(SlotIndex(0));
            assert!(landed.load(Ordering::SeqCst));
        });
    }
}
