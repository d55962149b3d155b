//! Keeps the requests of LMCache's peers that come before an engine. An LMCache peer waits for the answer
//! forever, even after a disconnection, so each request is kept until an engine comes.

use protocol::message::ToReceiver;
use protocol::receiver::Route;

/// The requests of LMCache's peers that wait for an engine.
#[derive(Debug, Default)]
pub(crate) struct PendingBeforeEngine {
    /// Requests on the init port, with the connection of each.
    introductions: Vec<(Route, Vec<u8>)>,
    /// Requests on the alloc port, from senders that made the handshake with an earlier process.
    asks: Vec<(Route, ToReceiver)>,
}

/// Maximum number of kept requests of each kind. If a further request comes, its peer is disconnected and asks
/// again.
const MAX_PENDING: usize = 64;
/// Maximum bytes of all kept requests of the init port together. A request of LMCache usually has a few
/// kilobytes of metadata, but may have up to 4 MiB.
const MAX_BYTES: usize = 8 << 20;

impl PendingBeforeEngine {
    /// Returns true if one more request of the init port may wait.
    pub(crate) fn has_room_for(&self, request: &[u8]) -> bool {
        let held: usize = self.introductions.iter().map(|(_, b)| b.len()).sum();
        self.introductions.len() < MAX_PENDING && held + request.len() <= MAX_BYTES
    }

    /// Keeps a request of the init port.
    pub(crate) fn introduced(&mut self, route: Route, request: &[u8]) {
        self.introductions.push((route, request.to_vec()));
    }

    /// Returns true if one more request of the alloc port may wait.
    pub(crate) fn has_room(&self) -> bool {
        self.asks.len() < MAX_PENDING
    }

    /// Keeps a request of the alloc port.
    pub(crate) fn asked(&mut self, route: Route, message: ToReceiver) {
        self.asks.push((route, message));
    }

    /// Drops the requests of a connection of the init port that has ended.
    pub(crate) fn lost_init(&mut self, route: Route) {
        self.introductions.retain(|(pending, _)| *pending != route);
    }

    /// Drops the requests of a connection of the alloc port that has ended.
    pub(crate) fn lost_alloc(&mut self, route: Route) {
        self.asks.retain(|(pending, _)| *pending != route);
    }

    /// Takes the requests of the init port, in order.
    pub(crate) fn introductions(&mut self) -> Vec<(Route, Vec<u8>)> {
        std::mem::take(&mut self.introductions)
    }

    /// Takes the requests of the alloc port, in order.
    pub(crate) fn asks(&mut self) -> Vec<(Route, ToReceiver)> {
        std::mem::take(&mut self.asks)
    }
}
