//! Simulation of slots and of the writes between them.
//!
//! If the receiving process itself writes into the slots (TCP), each piece has a tag, and an attacker on the path may
//! change, exchange and repeat pieces. A wrong tag breaks the data connection: nothing of its writes lands any more, and no
//! process knows how the writes ended.

use std::collections::{BTreeMap, BTreeSet};

use protocol::receiver::{self, SenderId};
use protocol::sender::{self, Piece};
use protocol::{LeaseId, SlotIndex, TransferId};

use super::model::Content;
use super::{Happening, MS, Plan, SECOND, World};

pub(crate) struct Wire {
    pub(crate) guarded: bool,
    /// Failures of the next writes, in reverse order: true if the end of the write stays unknown.
    pub(crate) fail_next: Vec<bool>,
    /// Content of each slot; `None` for undefined bytes.
    pub(crate) send: Vec<Option<Content>>,
    pub(crate) land: Vec<Option<Content>>,
    open: Vec<Option<LeaseId>>,
    last: Vec<Option<LeaseId>>,
    /// Leases with quarantined slots for which the receiver has asked for a proof.
    fenced: BTreeMap<LeaseId, SenderId>,
    /// Number of pieces still in flight, by the sender's epoch and lease.
    coming: BTreeMap<(u64, LeaseId), u32>,
    posted: BTreeSet<(TransferId, u64)>,
    refused: BTreeSet<(TransferId, u64)>,
    /// Writes that were in flight when the data connection broke.
    broken: BTreeSet<(TransferId, u64)>,
    /// Number of data connections so far.
    connection: u64,
    /// Pieces whose tags were verified on this connection.
    verified: BTreeSet<(TransferId, u64, u32)>,
    /// False if the receiver verifies no tags. Only the test of the simulation itself uses this.
    verifies: bool,
    /// The attack on the next write.
    pub(crate) attack: Option<Attack>,
    /// Slots that the decode engine is reading.
    pub(crate) reading: BTreeSet<u32>,
}

/// Arrival of one piece of a write at its slot.
#[derive(Clone, Debug)]
pub(crate) struct Landing {
    transfer: TransferId,
    from_epoch: u64,
    to_epoch: u64,
    lease: LeaseId,
    piece: Piece,
    /// Content that the piece must carry.
    expected: Option<Content>,
    connection: u64,
    /// Slot for which the sender computed the tag.
    tagged_for: SlotIndex,
    /// True if the attacker has changed the bytes.
    changed: bool,
}

/// The act of an attacker on the path.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Attack {
    /// Changes the bytes of a piece.
    Change,
    /// Exchanges the places of two pieces of a write.
    Exchange,
    /// Sends a piece again, later.
    Repeat,
}

/// End of a write.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    Done,
    Failed { terminal: bool },
}

impl Wire {
    pub(crate) fn new(plan: &Plan) -> Self {
        let (land, send) = (plan.land_slots, plan.send_slots);
        Self {
            guarded: plan.guarded,
            fail_next: Vec::new(),
            send: vec![None; send as usize],
            land: vec![None; land as usize],
            open: vec![None; land as usize],
            last: vec![None; land as usize],
            fenced: BTreeMap::new(),
            coming: BTreeMap::new(),
            posted: BTreeSet::new(),
            refused: BTreeSet::new(),
            broken: BTreeSet::new(),
            connection: 0,
            verified: BTreeSet::new(),
            verifies: plan.verifies,
            attack: None,
            reading: BTreeSet::new(),
        }
    }
}

impl World {
    pub(crate) fn post_write(&mut self, transfer: TransferId, lease: LeaseId, pieces: &[Piece]) {
        let (from_epoch, to_epoch) = (self.p_epoch, self.net.linked);
        self.wire.posted.insert((transfer, from_epoch));
        let end = match self.wire.fail_next.pop() {
            _ if to_epoch != self.d_epoch => End::Failed { terminal: true },
            None => End::Done,
            Some(unknown) => End::Failed { terminal: !unknown },
        };
        let mut latest = 0;
        let mut landings = Vec::new();
        for &piece in pieces {
            let delay = match end {
                // The piece may still be in flight long after the failure.
                End::Failed { terminal: false } => self.jitter(0, 3 * SECOND),
                _ => self.jitter(100, 20 * MS),
            };
            latest = latest.max(delay);
            let expected = self.wire.send[piece.from.0 as usize].clone();
            let Some((_, parts)) = &expected else {
                self.fail("a write of a slot that nobody staged");
            };
            let bytes: u64 = parts.iter().map(|part| part.bytes).sum();
            if (piece.offset, piece.bytes) != (0, bytes) || bytes > self.chunking.slot_bytes() {
                self.fail(&format!("{piece:?} does not cover {parts:?}"));
            }
            let landing = Landing {
                transfer,
                from_epoch,
                to_epoch,
                lease,
                piece,
                expected,
                connection: self.wire.connection,
                tagged_for: piece.to,
                changed: false,
            };
            landings.push((delay, landing));
        }
        if let Some(attack) = self.wire.attack.take_if(|_| self.wire.guarded) {
            self.attack_write(attack, &mut landings);
        }
        for (delay, landing) in landings {
            *self.wire.coming.entry((from_epoch, lease)).or_default() += 1;
            self.after(delay, Happening::Land(landing));
        }
        if matches!(end, End::Failed { terminal: false }) {
            self.outcome.lost_pieces += u32::try_from(pieces.len()).unwrap_or(u32::MAX);
            latest = 10 * MS;
        }
        self.after(latest + 1, Happening::WriteEnds(transfer, from_epoch, end));
        // The report `Lasting` may come before or after the end of the write, or never.
        let lasts = self.jitter(1, 60 * MS);
        if lasts < 40 * MS {
            self.after(lasts, Happening::WriteLasts(transfer, from_epoch));
        }
    }

    fn attack_write(&mut self, attack: Attack, landings: &mut Vec<(u64, Landing)>) {
        match (attack, &mut landings[..]) {
            (Attack::Change, [(_, first), ..]) => first.changed = true,
            (Attack::Exchange, [(_, first), (_, second), ..]) => {
                std::mem::swap(&mut first.piece.to, &mut second.piece.to);
            }
            (Attack::Repeat, [(delay, first), ..]) => {
                let again = (*delay + 1, first.clone());
                let later = (*delay + 60 * MS, first.clone());
                landings.extend([again, later]);
            }
            // The attack waits for a write of several pieces.
            (attack, _) => self.wire.attack = Some(attack),
        }
    }

    /// Returns true if the piece's tag is right and has not come before.
    fn verify(&mut self, landing: &Landing) -> bool {
        let piece = (landing.transfer, landing.from_epoch, landing.piece.to.0);
        landing.tagged_for == landing.piece.to
            && !landing.changed
            && self.wire.verified.insert(piece)
    }

    /// Ends the data connection. The next write uses a new one.
    fn break_connection(&mut self) {
        self.wire.connection += 1;
        self.wire.verified.clear();
        self.wire.broken.extend(self.wire.posted.iter());
    }

    pub(crate) fn write_lasts(&mut self, transfer: TransferId, epoch: u64) {
        if epoch == self.p_epoch {
            let event = sender::Event::Lasting { transfer };
            self.p.handle(protocol::Time(self.now), event);
        }
    }

    pub(crate) fn land(&mut self, landing: &Landing) {
        let key = (landing.from_epoch, landing.lease);
        if let Some(left) = self.wire.coming.get_mut(&key) {
            *left -= 1;
            if *left == 0 {
                self.wire.coming.remove(&key);
            }
        }
        if landing.to_epoch != self.d_epoch {
            return; // the memory of the old receiver is gone
        }
        let slot = landing.piece.to.0 as usize;
        let open = self.wire.open[slot] == Some(landing.lease);
        if self.wire.guarded && self.wire.verifies {
            if landing.connection != self.wire.connection {
                return; // the receiver has closed this connection
            }
            if !self.verify(landing) {
                // The tag follows the bytes, which may lie in the open slot already.
                if open {
                    self.wire.land[slot] = None;
                }
                self.break_connection();
                return;
            }
        }
        if self.wire.guarded && !open {
            // The receiver refuses this write: with TCP, the receiving process writes into the
            // slots itself.
            let write = (landing.transfer, landing.from_epoch);
            self.wire.refused.insert(write);
            return;
        }
        let quarantined = self.wire.open[slot].is_none()
            && self.wire.last[slot] == Some(landing.lease)
            && self.wire.fenced.contains_key(&landing.lease);
        if !open && !quarantined {
            self.fail(&format!("a write lands where it may not: {landing:?}"));
        }
        if self.wire.reading.contains(&landing.piece.to.0) {
            self.fail(&format!(
                "a write lands in a slot that is being read: {landing:?}"
            ));
        }
        let alive = landing.from_epoch == self.p_epoch
            && self
                .wire
                .posted
                .contains(&(landing.transfer, landing.from_epoch));
        let carried = self.wire.send[landing.piece.from.0 as usize].clone();
        if alive && !landing.changed && carried != landing.expected {
            self.fail(&format!("a write carries {carried:?} instead: {landing:?}"));
        }
        // The bytes of a write are undefined if the write has failed at its sender or if the
        // sender's process is dead.
        let intact = alive && !landing.changed;
        self.wire.land[slot] = if intact { carried } else { None };
    }

    pub(crate) fn write_ends(&mut self, transfer: TransferId, epoch: u64, end: End) {
        if !self.wire.posted.remove(&(transfer, epoch)) || epoch != self.p_epoch {
            return;
        }
        let event = match end {
            _ if self.wire.broken.remove(&(transfer, epoch)) => sender::Event::Failed {
                transfer,
                terminal: false,
            },
            _ if self.wire.refused.remove(&(transfer, epoch)) => sender::Event::Failed {
                transfer,
                terminal: true,
            },
            End::Done => sender::Event::Done {
                transfer,
                sums: Vec::new(),
                began: None,
            },
            End::Failed { terminal } => sender::Event::Failed { transfer, terminal },
        };
        self.p.handle(protocol::Time(self.now), event);
    }

    pub(crate) fn open_slot(&mut self, lease: LeaseId, slot: SlotIndex) {
        let slot = slot.0 as usize;
        if let Some(other) = self.wire.open[slot] {
            self.fail(&format!(
                "slot {slot} is opened for {lease} while open for {other}"
            ));
        }
        if self
            .wire
            .reading
            .contains(&u32::try_from(slot).unwrap_or(u32::MAX))
        {
            self.fail(&format!("slot {slot} is opened while it is read"));
        }
        self.wire.open[slot] = Some(lease);
        self.wire.last[slot] = Some(lease);
        self.wire.land[slot] = None;
    }

    pub(crate) fn close_slot(&mut self, slot: SlotIndex) {
        self.wire.open[slot.0 as usize] = None;
    }

    pub(crate) fn fence(&mut self, sender: &SenderId, lease: LeaseId) {
        self.wire.fenced.insert(lease, sender.clone());
        self.after(MS, Happening::Prove(self.d_epoch, lease));
    }

    /// Tells the receiver that no write of a lease can still land, if this is certain.
    pub(crate) fn prove(&mut self, d_epoch: u64, lease: LeaseId) {
        if d_epoch != self.d_epoch {
            return;
        }
        let Some(sender) = self.wire.fenced.get(&lease).cloned() else {
            return;
        };
        let dead = sender.epoch.0 != self.p_epoch;
        let coming = self.wire.coming.contains_key(&(sender.epoch.0, lease));
        if self.wire.guarded || (dead && !coming) {
            let event = receiver::Event::Fenced {
                sender,
                lease: Some(lease),
            };
            self.d.handle(protocol::Time(self.now), event);
        } else if dead {
            self.after(100 * MS, Happening::Prove(d_epoch, lease));
        }
    }

    /// Ends all writes of a dead sender. The writes may still land, but no process gets a report of
    /// their end.
    pub(crate) fn sender_dies(&mut self) {
        self.wire.posted.clear();
        self.wire.refused.clear();
        self.wire.broken.clear();
        self.wire.send.fill(None);
        let fenced: Vec<LeaseId> = self.wire.fenced.keys().copied().collect();
        for lease in fenced {
            self.after(MS, Happening::Prove(self.d_epoch, lease));
        }
    }

    /// Lets all writes to a dead receiver fail, and forgets its memory.
    pub(crate) fn receiver_dies(&mut self) {
        let posted: Vec<(TransferId, u64)> = self.wire.posted.iter().copied().collect();
        for (transfer, epoch) in posted {
            let end = End::Failed { terminal: true };
            self.after(MS, Happening::WriteEnds(transfer, epoch, end));
        }
        self.wire.land.fill(None);
        self.wire.open.fill(None);
        self.wire.last.fill(None);
        self.wire.fenced.clear();
        self.wire.reading.clear();
    }
}
