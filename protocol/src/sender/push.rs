//! Grants send slots, posts writes and handles their ends.

use super::request::{Chunk, Phase};
use super::{Action, After, Piece, Sender};
use crate::local::{Granted, LayersStaged};
use crate::message::{Slots, ToReceiver, Written};
use crate::{Reason, RequestId, Time, TransferId};

impl Sender {
    /// Gives send slots to chunks that the engine is about to complete. The oldest request comes
    /// first.
    pub(super) fn grant_slots(&mut self) {
        if self.slots.free() == 0 {
            return;
        }
        let mut order: Vec<(u64, RequestId)> = self
            .requests
            .iter()
            .filter(|(_, r)| match &r.phase {
                Phase::Leased(_) => true,
                Phase::Feeding(feeding) => !feeding.over,
                _ => false,
            })
            .map(|(id, r)| (r.order, id.clone()))
            .collect();
        order.sort_unstable();
        for (_, id) in order {
            let Some(request) = self.requests.get_mut(&id) else {
                continue;
            };
            let have_tokens = request.lease().map_or(0, |l| l.have_tokens);
            let mut granted = Granted::nothing(id.clone(), have_tokens);
            let plan = request.plan(&self.chunking);
            for (index, chunk) in (0u32..).zip(&mut request.chunks) {
                let to = match *chunk {
                    Chunk::Remote { to } => Some(to),
                    Chunk::Waiting if matches!(request.phase, Phase::Feeding(_)) => None,
                    _ => continue,
                };
                // The engine completes chunks in order. If a later chunk got a slot now, the slot
                // would stay empty until the engine completes this chunk.
                if plan.needs(index) > request.upto {
                    break;
                }
                let Some(from) = self.slots.take() else {
                    break;
                };
                *chunk = match to {
                    Some(to) => Chunk::Granted { from, to },
                    None => Chunk::Filling { from },
                };
                granted.chunks.push(index);
                granted.slots.push(from.0);
            }
            if let (Some(engine), false) = (request.engine, granted.chunks.is_empty()) {
                request.progress = self.now;
                self.actions.push_back(Action::Granted(engine, granted));
            }
        }
    }

    /// Posts one write for all gathered chunks, which are the chunks of one `Staged` message.
    pub(super) fn post(&mut self, id: &RequestId, after: Option<After>, layers: Vec<LayersStaged>) {
        let now = self.now;
        let transfer = TransferId(self.next_transfer);
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        if !matches!(request.phase, Phase::Leased(_)) {
            return;
        }
        // All chunks are in one write, so that one `Written` is enough.
        let plan = request.plan(&self.chunking);
        let mut pieces = Vec::new();
        for (index, chunk) in (0u32..).zip(&mut request.chunks) {
            if let Chunk::Staged { from, to } = *chunk {
                *chunk = Chunk::Posted { from, to, transfer };
                pieces.push(Piece {
                    from,
                    to,
                    offset: 0,
                    bytes: plan.size(index),
                });
            }
        }
        let (to, Some(lease)) = (request.to.clone(), request.lease_mut()) else {
            return;
        };
        if pieces.is_empty() {
            return;
        }
        let lease = lease.id;
        if request.in_flight == 0 {
            request.push_since = now;
        }
        request.in_flight += 1;
        self.next_transfer += 1;
        self.transfers.insert(transfer, id.clone());
        let waits = after.is_some();
        self.actions.push_back(Action::Write {
            to,
            transfer,
            lease,
            pieces,
            after,
            layers,
        });
        // The write cannot end before its event has fired, so the sender tells the receiver about
        // the write at once.
        if waits {
            self.on_lasting(transfer);
        }
    }

    /// Tells the receiver that a write is in flight, so that the receiver's transport makes
    /// progress. A write that ends at once does not need this message: sending it would take longer
    /// than the write.
    pub(super) fn on_lasting(&mut self, transfer: TransferId) {
        let now = self.now;
        let request = self.transfers.get(&transfer);
        let Some(request) = request.and_then(|id| self.requests.get_mut(id)) else {
            return; // the write has ended in the meantime
        };
        let indexes = request.chunks.iter().filter_map(|c| match c {
            Chunk::Posted {
                to, transfer: t, ..
            } if *t == transfer => Some(to.0),
            _ => None,
        });
        let indexes = indexes.collect();
        let to = request.to.clone();
        let Some(lease) = request.lease_mut() else {
            return;
        };
        lease.spoke = now;
        let writing = Slots {
            lease: lease.id,
            epoch: lease.epoch,
            indexes,
        };
        self.send(&to, ToReceiver::Writing(writing));
    }

    /// Handles the success of a write: sends `Written`, or ends the request that waited for the
    /// write.
    pub(super) fn on_done(&mut self, transfer: TransferId, sums: &[u64], began: Option<Time>) {
        let done = |sum, to| Chunk::Done { to, sum };
        let Some(id) = self.settle(transfer, done, sums, began) else {
            return;
        };
        match self.requests.get(&id).map(|r| &r.phase) {
            Some(Phase::Closing { .. }) => return self.close(&id),
            Some(Phase::Feeding(_)) => return self.finish_fed(&id),
            _ => {}
        }
        self.send_written(&id);
        if self.requests.get(&id).is_some_and(super::Request::is_done) {
            self.tell_done(&id, None);
        }
    }

    /// Handles the failure of a write: notes the dirty slots and ends the request.
    pub(super) fn on_failed(&mut self, transfer: TransferId, terminal: bool) {
        let request = self.transfers.get(&transfer);
        let request = request.and_then(|id| self.requests.get_mut(id));
        if let (false, Some(request)) = (terminal, request) {
            let positions = (0u32..)
                .zip(&request.chunks)
                .filter(|(_, c)| matches!(c, Chunk::Posted { transfer: t, .. } if *t == transfer));
            let positions: Vec<u32> = positions.map(|(i, _)| i).collect();
            if let Phase::Feeding(feeding) = &mut request.phase {
                feeding.dirty.extend(positions);
            }
            let slots: Vec<u32> = request
                .chunks
                .iter()
                .filter_map(|c| match c {
                    Chunk::Posted {
                        to, transfer: t, ..
                    } if *t == transfer => Some(to.0),
                    _ => None,
                })
                .collect();
            if let Some(lease) = request.lease_mut() {
                lease.dirty.extend(slots);
            }
        }
        // The sender frees the send slots even if the write may still read them. If the write still
        // moves bytes, the bytes land only in slots that the receiver quarantines.
        let Some(id) = self.settle(transfer, |_, to| Chunk::Remote { to }, &[], None) else {
            return;
        };
        self.end(&id, Reason::TransferFailed);
        self.close(&id);
        self.retire_fed(&id);
    }

    /// Removes a write that has ended: sets its chunks to the state that `next` returns, and frees
    /// its send slots. Returns the id of its request.
    fn settle(
        &mut self,
        transfer: TransferId,
        next: impl Fn(Option<u64>, crate::SlotIndex) -> Chunk,
        sums: &[u64],
        began: Option<Time>,
    ) -> Option<RequestId> {
        let id = self.transfers.remove(&transfer)?;
        let now = self.now;
        let request = self.requests.get_mut(&id)?;
        let plan = request.plan(&self.chunking);
        let mut sums = sums.iter();
        for (index, chunk) in (0u32..).zip(&mut request.chunks) {
            let Chunk::Posted {
                from,
                to,
                transfer: posted,
            } = *chunk
            else {
                continue;
            };
            if posted != transfer {
                continue;
            }
            *chunk = next(sums.next().copied(), to);
            self.slots.give(from);
            if chunk.is_done() {
                request.record.chunks += 1;
                request.record.bytes += plan.size(index);
            }
        }
        request.progress = now;
        request.in_flight = request.in_flight.saturating_sub(1);
        match began {
            // The push time does not include the wait for the engine's GPU. The time of overlapping
            // writes counts only once. Writes end in the order of their events.
            Some(began) => {
                request.record.push_us += now.micros_since(began.max(request.push_until));
                request.push_until = now;
            }
            None if request.in_flight == 0 => {
                request.record.push_us += now.micros_since(request.push_since);
            }
            None => {}
        }
        Some(id)
    }

    /// Sends `Written` for all chunks that the receiver has not acknowledged.
    pub(super) fn send_written(&mut self, id: &RequestId) {
        let now = self.now;
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let to = request.to.clone();
        let done: Vec<(u32, crate::SlotIndex, Option<u64>)> = (0u32..)
            .zip(&request.chunks)
            .filter_map(|(i, c)| match c {
                Chunk::Done { to, sum } => Some((i, *to, *sum)),
                _ => None,
            })
            .collect();
        let Some(lease) = request.lease_mut() else {
            return;
        };
        if done.is_empty() {
            return;
        }
        lease.spoke = now;
        let sums: Vec<u64> = done.iter().filter_map(|d| d.2).collect();
        let written = Written {
            lease: lease.id,
            epoch: lease.epoch,
            chunks: done.iter().map(|d| d.0).collect(),
            indexes: done.iter().map(|d| d.1.0).collect(),
            sums: if sums.len() == done.len() {
                sums
            } else {
                Vec::new()
            },
        };
        self.send(&to, ToReceiver::Written(written));
    }
}
