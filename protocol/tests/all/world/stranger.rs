//! A malicious peer: it asks for slots, reports writes that never happened, cancels requests of
//! other senders and vanishes.

use protocol::message::{
    AllocRequest, AllocX, CancelNotif, CancelX, Extend, Slots, ToReceiver, ToSender, Written,
};
use protocol::receiver::{self, Route};
use protocol::{Epoch, LeaseId, Reason};
use rand::Rng;

use super::{Happening, MS, World};
use crate::setup::CHUNK;

/// Connection of the malicious peer.
pub(crate) const ROUTE: Route = Route(1 << 40);

impl World {
    /// Sends an alloc request that names either an unknown request or a parked request.
    pub(crate) fn stranger_asks(&mut self) {
        let seq: u64 = self.rng.random_range(0..1000);
        let tokens = self.rng.random_range(1..6u32) * CHUNK - 1;
        let chunks = self.chunking.plan(tokens, 0).chunks();
        let mut req_id = format!("stranger-{seq}");
        if self.rng.random() {
            let any = self.rng.random_range(0..8u32);
            let cancel = CancelNotif {
                req_id: format!("r{any}"),
                keys: Vec::new(),
                x: None,
                ..CancelNotif::example()
            };
            self.stranger_says(ToReceiver::CancelNotif(cancel));
            // The peer cannot guess the ids of real requests, so the test gives the peer the id of
            // a parked request.
            req_id = self.decode.waits().unwrap_or(req_id);
        }
        let request = AllocRequest {
            keys: (0..chunks).map(|i| format!("stranger/{i}")).collect(),
            fmt: 1,
            shape: Vec::new(),
            dtype: String::new(),
            last_chunk_toks: 1,
            req_id,
            is_last_batch: true,
            total_chunks: chunks,
            x: Some(AllocX {
                seq,
                id: "stranger".into(),
                epoch: Epoch(9),
                to_epoch: Epoch(self.d_epoch),
                tokens,
                lease_ms: self.rng.random_range(0..2000),
                wait_ms: self.rng.random_range(0..200),
                park_ms: self.rng.random_range(0..200),
                transport: "nixl".into(),
                ..AllocX::example()
            }),
            ..AllocRequest::example()
        };
        self.stranger_says(ToReceiver::AllocRequest(request));
    }

    /// Sends messages about the lease of another member. Without keys only the lease's random id protects the lease; a
    /// member may not act for another member even if it knows the id. Each of these messages would free slots into which
    /// the sender still writes, or show a chunk that is not written.
    pub(crate) fn member_forges(&mut self) {
        let Some(lease) = self.overheard.filter(|_| self.keyed) else {
            return;
        };
        let epoch = Epoch(self.d_epoch);
        let all: Vec<u32> = (0..self.d_slots).collect();
        let cancel = CancelX {
            seq: 1,
            lease,
            epoch,
            reason: Reason::Cancelled,
            dirty: Vec::new(),
            ..CancelX::example()
        };
        let chunk = self.rng.random_range(0..3);
        let slot = self.rng.random_range(0..self.d_slots);
        let message = match self.rng.random_range(0..3) {
            0 => ToReceiver::CancelNotif(CancelNotif {
                req_id: "r0".into(),
                keys: Vec::new(),
                x: Some(cancel),
                ..CancelNotif::example()
            }),
            1 => ToReceiver::Written(Written {
                lease,
                epoch,
                chunks: vec![chunk],
                indexes: vec![slot],
                sums: Vec::new(),
                ..Written::example()
            }),
            _ => ToReceiver::Writing(Slots {
                lease,
                epoch,
                indexes: all,
                ..Slots::example()
            }),
        };
        self.stranger_says(message);
    }

    fn stranger_says(&mut self, message: ToReceiver) {
        let delay = self.jitter(0, 50 * MS);
        let event = receiver::Event::Peer {
            route: ROUTE,
            message,
        };
        self.after(delay, Happening::ToReceiver(event, self.d_epoch));
    }

    /// Handles an answer to the malicious peer.
    pub(crate) fn stranger_hears(&mut self, message: &ToSender) {
        let (lease, slots) = match message {
            ToSender::AllocResponse(response) => {
                let lease = response.x.as_ref().and_then(|x| x.lease);
                let slots = response.remote_indexes.iter();
                (
                    lease,
                    slots.filter_map(|&i| u32::try_from(i).ok()).collect(),
                )
            }
            ToSender::More(more) => (Some(more.lease), more.indexes.clone()),
            ToSender::Ack(_) | ToSender::Unwanted(_) => (None, Vec::new()),
        };
        let Some(lease) = lease else {
            return;
        };
        let epoch = Epoch(self.d_epoch);
        match self.rng.random_range(0..6) {
            0 => {}
            1 => self.stranger_says(ToReceiver::Writing(Slots {
                lease,
                epoch,
                indexes: (0..self.d_slots + 3).collect(),
                ..Slots::example()
            })),
            2 => {
                let chunks = (0..u32::try_from(slots.len()).unwrap_or(0)).collect();
                self.stranger_says(ToReceiver::Written(Written {
                    lease,
                    epoch,
                    chunks,
                    indexes: slots,
                    sums: Vec::new(),
                    ..Written::example()
                }));
            }
            3 => self.stranger_says(ToReceiver::Extend(Extend {
                lease,
                epoch,
                granted: Vec::new(),
                ..Extend::example()
            })),
            4 => {
                let lease = if self.rng.random() {
                    lease
                } else {
                    LeaseId(self.rng.random())
                };
                self.stranger_says(ToReceiver::CancelNotif(CancelNotif {
                    req_id: "r0".into(),
                    keys: Vec::new(),
                    x: Some(CancelX {
                        seq: 1,
                        lease,
                        epoch,
                        reason: Reason::Cancelled,
                        dirty: (0..self.d_slots + 3).collect(),
                        ..CancelX::example()
                    }),
                    ..CancelNotif::example()
                }));
            }
            _ => {
                let event = receiver::Event::PeerLost { route: ROUTE };
                self.after(MS, Happening::ToReceiver(event, self.d_epoch));
            }
        }
    }
}
