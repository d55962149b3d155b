//! The wires of one buffer: made at start, cut with it, and the choice between them per peer.

use std::sync::Arc;

use protocol::message::Advert;
use protocol::{LeaseId, SlotIndex};

use crate::config::Wire;
use crate::transport::choose::{self, Choice};
use crate::transport::{Kind, Transport};

/// Every wire that this process can use for one buffer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wires {
    configured: Wire,
    transports: Vec<Arc<dyn Transport>>,
}

impl Wires {
    pub(crate) fn new(configured: Wire, transports: Vec<Arc<dyn Transport>>) -> Self {
        Self {
            configured,
            transports,
        }
    }

    /// Best first, for the init handshake.
    pub(crate) fn adverts(&self) -> Vec<Advert> {
        self.transports.iter().map(|t| t.advert()).collect()
    }

    /// NIXL's agent metadata; empty without NIXL.
    pub(crate) fn metadata(&self) -> Vec<u8> {
        self.transports
            .iter()
            .map(|t| t.metadata())
            .find(|m| !m.is_empty())
            .unwrap_or_default()
    }

    /// The wire to a peer that advertises these, and why it is that one.
    ///
    /// # Errors
    /// Both sides' wires and the configuration, as a sentence, if they have none in common.
    pub(crate) fn choose(
        &self,
        theirs: &[Advert],
    ) -> Result<(Arc<dyn Transport>, String), String> {
        let ours: Vec<Kind> = self.transports.iter().map(|t| t.kind()).collect();
        let Choice { kind, why } = choose::choose(self.configured, &ours, theirs)?;
        self.transports
            .iter()
            .find(|t| t.kind() == kind)
            .map(|t| (Arc::clone(t), why))
            .ok_or_else(|| format!("no {kind} transport in this process"))
    }

    pub(crate) fn open(&self, lease: LeaseId, slot: SlotIndex) {
        for transport in &self.transports {
            transport.open(lease, slot);
        }
    }

    pub(crate) fn close(&self, slot: SlotIndex) {
        for transport in &self.transports {
            transport.close(slot);
        }
    }

    /// Whether closing a slot keeps every later write out, for a sender that uses this wire.
    pub(crate) fn close_is_a_fence(&self, name: &str) -> bool {
        let named = self.transports.iter().find(|t| t.kind().as_str() == name);
        named.is_some_and(|t| t.close_is_a_fence())
    }

    pub(crate) fn expect(&self, writing: bool) {
        for transport in &self.transports {
            transport.expect(writing);
        }
    }

    /// Cuts the buffer into slots for every wire.
    ///
    /// # Errors
    /// What a wire says against it.
    pub(crate) fn cut(&self, slots: u32, slot_bytes: u64) -> Result<(), String> {
        for transport in &self.transports {
            transport.cut(slots, slot_bytes)?;
        }
        Ok(())
    }

    /// NIXL's row of each slot; empty without NIXL.
    pub(crate) fn rows(&self) -> Vec<protocol::dlist::Row> {
        self.transports
            .iter()
            .map(|t| t.rows())
            .find(|r| !r.is_empty())
            .unwrap_or_default()
    }
}
