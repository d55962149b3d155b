//! Prepares the writes of a sender: their parts by layers, the events that they wait for, and their checksums.

use std::sync::Arc;

use futures::future::BoxFuture;
use protocol::LeaseId;
use protocol::local::{Granted, LayersStaged, Target};
use protocol::sender::{After, Piece};

use super::{SenderTask, ranges};
use crate::transport::readiness::Times;
use crate::transport::{Outcome, Ready};

impl SenderTask {
    /// Posts one part of a write. Returns a future of the part's outcome, and the part's times.
    pub(super) fn write(
        &self,
        to: &Target,
        lease: LeaseId,
        pieces: Vec<Piece>,
        after: Option<After>,
    ) -> (BoxFuture<'static, Outcome>, Arc<Times>) {
        match self.ready(after) {
            Ok(ready) => {
                let times = ready.times();
                (self.peers.write(to, ready, lease, pieces), times)
            }
            Err(unsent) => (Box::pin(std::future::ready(unsent)), Arc::default()),
        }
    }

    /// Returns true if these chunks probably arrive sooner when the engine gathers them layer by layer.
    pub(super) fn gains_by_layers(&self, granted: &Granted) -> bool {
        let to = self
            .machine
            .as_ref()
            .and_then(|m| m.leased_from(&granted.req));
        // The layers of a chunk with several groups are not one run of bytes in each plane.
        let bytes = self
            .engines
            .slot_layout()
            .filter(|slot_layout| slot_layout.layout.groups.is_empty())
            .map(|slot_layout| slot_layout.slot_bytes);
        to.zip(bytes).is_some_and(|(to, bytes)| {
            let bytes = bytes.saturating_mul(granted.chunks.len() as u64);
            self.peers.divides(to, bytes).is_some()
        })
    }

    /// Divides a write by ranges of layers if that saves time; otherwise the result has one part. The last
    /// part ends the write.
    pub(super) fn parts(
        &self,
        to: &Target,
        pieces: Vec<Piece>,
        after: Option<After>,
        layers: &[LayersStaged],
    ) -> Vec<(Vec<Piece>, Option<After>)> {
        let divided = after
            .zip(self.engines.slot_layout())
            .and_then(|(after, slot_layout)| {
                let granule = self
                    .peers
                    .divides(to, pieces.iter().map(|p| p.bytes).sum())?;
                let parts = ranges::divide(&pieces, layers, &slot_layout.layout, granule)?;
                let wait = |event| Some(After { event, ..after });
                Some(
                    parts
                        .into_iter()
                        .map(|(event, part)| (part, wait(event)))
                        .collect(),
                )
            });
        divided.unwrap_or_else(|| vec![(pieces, after)])
    }

    /// Returns the readiness of a write's slots, or the write's failed outcome if the engine never announced
    /// the event.
    pub(super) fn ready(&self, after: Option<After>) -> Result<Ready, Outcome> {
        let Some(After { engine, event }) = after else {
            return Ok(Ready::now());
        };
        match self.engines.event(engine, event) {
            Some(event) => Ok(Ready::after(event)),
            None => Err(Outcome::Failed {
                terminal: true,
                error: format!("engine {engine} named event {event}, which is not in its hello"),
            }),
        }
    }

    /// Returns a function that computes the checksum of each piece; it returns no sums if checksums are off.
    /// Call the function after the write: before the write, the slots are perhaps not filled yet. The slots
    /// stay unchanged until the machine receives the end of the write.
    pub(super) fn sums(&self, pieces: &[Piece]) -> impl FnOnce() -> Vec<u64> + use<> {
        let slot_layout = self
            .engines
            .slot_layout()
            .filter(|_| self.context.config.checksum);
        let of: Vec<(u64, u64)> = slot_layout.map_or_else(Vec::new, |slot_layout| {
            let place = |p: &Piece| (u64::from(p.from.0) * slot_layout.slot_bytes, p.bytes);
            pieces.iter().map(place).collect()
        });
        let buffer = Arc::clone(&self.buffer);
        move || {
            of.into_iter()
                .filter_map(|(offset, bytes)| buffer.sum(offset, bytes).ok())
                .collect()
        }
    }
}
