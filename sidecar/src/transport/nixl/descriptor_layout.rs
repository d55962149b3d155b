//! Divides slots into NIXL descriptors.

use std::rc::Rc;

use ::nixl::LocalList;
use protocol::sender::Piece;

use super::wire::Wire;

/// The division of a buffer of slots into descriptors.
///
/// A descriptor is smaller than a slot, so that a partial chunk is written without the rest of its slot. Both
/// sides have the same descriptors in each slot, so that equal positions have equal lengths. The last
/// descriptor of a slot may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DescriptorLayout {
    pub(super) slots: u32,
    pub(super) slot_bytes: u64,
    descriptor_bytes: u64,
    per_slot: u64,
}

/// The present descriptor layout, with the list that NIXL prepared for it.
#[derive(Clone, Debug)]
pub(super) struct Slots {
    pub(super) layout: DescriptorLayout,
    pub(super) list: Rc<LocalList>,
}

impl DescriptorLayout {
    /// Makes a layout; `None` if there is nothing to divide, or if there are more descriptors than NIXL's
    /// indices allow.
    pub(super) fn new(slots: u32, slot_bytes: u64, wire: Wire) -> Option<Self> {
        if slots == 0 || slot_bytes == 0 {
            return None;
        }
        let descriptor_bytes = wire.descriptor_bytes(slot_bytes);
        let per_slot = slot_bytes.div_ceil(descriptor_bytes);
        let all = u64::from(slots).checked_mul(per_slot)?;
        u64::from(slots).checked_mul(slot_bytes)?;
        i32::try_from(all).ok()?;
        Some(Self {
            slots,
            slot_bytes,
            descriptor_bytes,
            per_slot,
        })
    }

    /// Returns the bytes of a descriptor. The last descriptor of a slot may be shorter.
    pub(super) fn descriptor_bytes(self) -> u64 {
        self.descriptor_bytes
    }

    /// Returns the offset and length of every descriptor of one slot.
    pub(super) fn of_slot(self) -> impl Iterator<Item = (u64, u64)> {
        (0..self.per_slot).map(move |i| {
            let offset = i * self.descriptor_bytes;
            (offset, self.descriptor_bytes.min(self.slot_bytes - offset))
        })
    }

    /// Returns the offset and length of every descriptor of the buffer, in the order of their indices.
    pub(super) fn ranges(self) -> Vec<(u64, u64)> {
        (0..u64::from(self.slots))
            .flat_map(|slot| {
                self.of_slot()
                    .map(move |(offset, bytes)| (slot * self.slot_bytes + offset, bytes))
            })
            .collect()
    }

    /// Returns the descriptors that carry `pieces`, in batches of about `batch_bytes`.
    ///
    /// # Errors
    /// Names the first invalid piece. A piece is invalid if its slot does not exist on one of the two sides,
    /// if it is longer than its slot, or if it begins within a descriptor.
    pub(super) fn batches(
        self,
        pieces: &[Piece],
        remote_slots: u32,
        batch_bytes: u64,
    ) -> Result<Vec<Batch>, Piece> {
        let mut batches = Vec::new();
        let mut batch = Batch::default();
        for piece in pieces {
            if piece.from.0 >= self.slots
                || piece.to.0 >= remote_slots
                || !piece.offset.is_multiple_of(self.descriptor_bytes)
                || piece.offset.saturating_add(piece.bytes) > self.slot_bytes
            {
                return Err(*piece);
            }
            let first = piece.offset / self.descriptor_bytes;
            for i in first..first + piece.bytes.div_ceil(self.descriptor_bytes) {
                let index = |slot: u32| i32::try_from(u64::from(slot) * self.per_slot + i);
                let (Ok(from), Ok(to)) = (index(piece.from.0), index(piece.to.0)) else {
                    return Err(*piece);
                };
                batch.from.push(from);
                batch.to.push(to);
                batch.bytes += self
                    .descriptor_bytes
                    .min(self.slot_bytes - i * self.descriptor_bytes);
                if batch.bytes >= batch_bytes {
                    batches.push(std::mem::take(&mut batch));
                }
            }
        }
        if !batch.from.is_empty() {
            batches.push(batch);
        }
        Ok(batches)
    }
}

/// The descriptors of one request: `from[i]` is written to `to[i]`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) from: Vec<i32>,
    pub(super) to: Vec<i32>,
    pub(super) bytes: u64,
}

#[cfg(test)]
mod tests {
    use protocol::SlotIndex;

    use super::*;

    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;

    fn piece(from: u32, to: u32, bytes: u64) -> Piece {
        Piece {
            from: SlotIndex(from),
            to: SlotIndex(to),
            offset: 0,
            bytes,
        }
    }

    #[test]
    fn descriptors_cover_each_slot_once_and_in_order() {
        for wire in [Wire::Descriptors, Wire::Streams] {
            for slot_bytes in [1, 4096, 100_000, MIB, MIB + 1, 3 * MIB + 512, 32 * MIB] {
                let layout = DescriptorLayout::new(5, slot_bytes, wire).unwrap();
                let mut at = 0;
                for (offset, bytes) in layout.ranges() {
                    assert_eq!(offset, at, "{wire:?} {slot_bytes}");
                    assert!(bytes > 0);
                    at += bytes;
                }
                assert_eq!(at, 5 * slot_bytes);
            }
        }
    }

    #[test]
    fn what_cannot_be_indexed_is_not_cut() {
        assert_eq!(DescriptorLayout::new(0, MIB, Wire::Streams), None);
        assert_eq!(DescriptorLayout::new(1, 0, Wire::Streams), None);
        assert_eq!(DescriptorLayout::new(u32::MAX, MIB, Wire::Streams), None);
        assert_eq!(DescriptorLayout::new(2, u64::MAX, Wire::Descriptors), None);
    }

    #[test]
    fn a_partial_chunk_takes_the_descriptors_that_it_touches() {
        let layout = DescriptorLayout::new(4, 4 * MIB, Wire::Descriptors).unwrap();
        let check = |bytes, expect: i32| {
            let batches = layout.batches(&[piece(1, 3, bytes)], 4, u64::MAX).unwrap();
            let per_slot = i32::try_from(layout.per_slot).unwrap();
            match expect {
                0 => assert_eq!(batches, []),
                n => {
                    let [batch] = &batches[..] else { panic!() };
                    assert_eq!(batch.from, (per_slot..per_slot + n).collect::<Vec<_>>());
                    assert_eq!(
                        batch.to,
                        (3 * per_slot..3 * per_slot + n).collect::<Vec<_>>()
                    );
                }
            }
        };
        assert_eq!(layout.descriptor_bytes, 64 * KIB);
        check(0, 0);
        check(1, 1);
        check(64 * KIB, 1);
        check(64 * KIB + 1, 2);
        check(4 * MIB, 64);
    }

    #[test]
    fn a_part_of_a_chunk_takes_its_descriptors_only() {
        let layout = DescriptorLayout::new(4, 4 * MIB, Wire::Descriptors).unwrap();
        let part = Piece {
            offset: 128 * KIB,
            ..piece(1, 3, 192 * KIB)
        };
        let batches = layout.batches(&[part], 4, u64::MAX).unwrap();
        assert_eq!(batches[0].from, [66, 67, 68]);
        assert_eq!(batches[0].to, [194, 195, 196]);
        for (offset, bytes) in [(1, 1), (4 * MIB, 1), (64 * KIB, 4 * MIB)] {
            let bad = Piece {
                offset,
                ..piece(0, 0, bytes)
            };
            assert_eq!(layout.batches(&[bad], 4, u64::MAX), Err(bad));
        }
    }

    #[test]
    fn batches_are_bounded_and_lose_nothing() {
        let layout = DescriptorLayout::new(8, MIB, Wire::Streams).unwrap();
        let pieces: Vec<Piece> = (0..8).map(|i| piece(i, 7 - i, MIB)).collect();
        let whole = layout.batches(&pieces, 8, u64::MAX).unwrap();
        let parts = layout.batches(&pieces, 8, 2 * MIB).unwrap();
        assert_eq!((whole.len(), parts.len()), (1, 4));
        let joined: Vec<i32> = parts.iter().flat_map(|part| part.to.clone()).collect();
        assert_eq!(joined, whole[0].to);
    }

    #[test]
    fn pieces_outside_either_buffer_are_named() {
        let layout = DescriptorLayout::new(4, MIB, Wire::Streams).unwrap();
        for bad in [piece(4, 0, 1), piece(0, 2, 1), piece(0, 0, MIB + 1)] {
            let pieces = [piece(0, 0, MIB), bad];
            assert_eq!(layout.batches(&pieces, 2, u64::MAX), Err(bad));
        }
    }
}
